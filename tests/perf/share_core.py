"""The EngineCore of bench_share.py: the real one, which also logs when its device was busy.

Leaves in its working folder worker.json (the device's thread) at its start, and device.bin at its end: int64[n, 3],
begin and end of each stretch in ns of the monotonic clock, and the tokens it sampled.
"""

import json
import os
import sys
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import launch
from engine.messages import decode_result
from engine.worker import executor


class _Timed:
    """A runner whose forward passes and samplings are logged; called by the device's thread only."""

    def __init__(self, runner: Any):
        self._runner = runner
        self.log = array("q")

    def forward(self, message: bytes) -> None:
        self._run(lambda: self._runner.forward(message))

    def sample(self, step: int, masks: bytes = b"") -> bytes:
        return self._run(lambda: self._runner.sample(step, masks))

    def _run(self, part: Callable[[], Any]) -> Any:
        began = time.monotonic_ns()
        result = part()
        ended = time.monotonic_ns()
        tokens = len(decode_result(result).tokens) // 4 if result is not None else 0
        self.log.extend((began, ended, tokens))
        return result


class LoggingExecutor(executor.InProcessExecutor):
    """The executor of one rank, with a log of its thread."""

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self._timed = _Timed(self._runner)
        self._runner = self._timed  # type: ignore[assignment]
        thread = self._thread.submit(threading.get_native_id).result()
        Path("worker.json").write_text(json.dumps({"process": os.getpid(), "thread": thread}))

    def shutdown(self) -> None:
        super().shutdown()
        Path("device.bin").write_bytes(self._timed.log.tobytes())


if __name__ == "__main__":
    executor.InProcessExecutor = LoggingExecutor  # type: ignore[misc]
    sys.exit(launch.main())
