"""A neighbor on a machine: one process on each core, which always computes or only half of the time.

    half   computes for 5 ms and then sleeps for 5 ms, over and over
    busy   computes all the time

Beside others it gets what the system's scheduler gives it.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.perf.child_processes import start_child

ROOT = Path(__file__).parents[2]
BUSY_S = 5e-3
PAUSE_S = {"half": 5e-3, "busy": 0.0}


class Neighbor:
    """Its processes, since some moment."""

    def __init__(self, pids: Sequence[int]):
        self._pids = pids
        self._began = time.monotonic()
        self._before = self._cpu_s()

    def share(self) -> float:
        """Of the time of all its cores, how much it has taken since this object was made."""
        return (self._cpu_s() - self._before) / (time.monotonic() - self._began) / max(1, len(self._pids))

    def _cpu_s(self) -> float:
        return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in self._pids) / 1e9


@contextmanager
def neighbor(kind: str, cores: Sequence[int]) -> Iterator[Neighbor]:
    """A process of this kind on each of these cores, none for none; yields once all of them run."""
    processes = []
    try:
        for core in cores:
            processes.append(start_child([sys.executable, "-m", "tests.perf.neighbor", kind, str(core)], cwd=ROOT))
        for process in processes:
            while not _is_on_one_core(process.pid) and process.poll() is None:
                time.sleep(0.01)
        yield Neighbor([process.pid for process in processes])
        ended = [process.returncode for process in processes if process.poll() is not None]
        if ended:
            sys.exit(f"{len(ended)} of {len(processes)} processes of the neighbor ended by themselves: {ended[0]}")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _is_on_one_core(pid: int) -> bool:
    return len(os.sched_getaffinity(pid)) == 1


def compute(pause_s: float) -> None:
    while True:
        end = time.process_time() + BUSY_S
        while time.process_time() < end:
            pass
        if pause_s:
            time.sleep(pause_s)


if __name__ == "__main__":
    os.sched_setaffinity(0, {int(sys.argv[2])})
    compute(PAUSE_S[sys.argv[1]])
