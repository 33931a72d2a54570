"""The EngineCore of bench_mm_stall.py: the one of share_core.py, which also logs each turn of its loop.

Leaves loop.bin beside device.bin: int64[n, 3], begin and end of each turn that did something, in ns of the monotonic
clock, and the CPU time that the loop's thread took for it, in ns.
"""

import sys
import time
from array import array
from pathlib import Path

from engine import launch
from engine.core.engine import EngineCore
from engine.worker import executor
from tests.perf.share_core import LoggingExecutor

TURNS = array("q")
step_of_engine = EngineCore.step


def step(core: EngineCore, now: float) -> bool:
    began, cpu = time.monotonic_ns(), time.thread_time_ns()
    moved = step_of_engine(core, now)
    if moved:
        TURNS.extend((began, time.monotonic_ns(), time.thread_time_ns() - cpu))
    return moved


class TurnLoggingExecutor(LoggingExecutor):
    """Writes the log of the turns at the end."""

    def shutdown(self) -> None:
        super().shutdown()
        Path("loop.bin").write_bytes(TURNS.tobytes())


if __name__ == "__main__":
    EngineCore.step = step  # type: ignore[method-assign]
    executor.InProcessExecutor = TurnLoggingExecutor  # type: ignore[misc]
    sys.exit(launch.main())
