"""A neighbor on a machine: on each core a process that computes for 5 ms and then sleeps for 5 ms, over and over.

Where it is alone it takes half of each core; beside others it gets what the system's scheduler gives it.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.perf.child_processes import start_child

ROOT = Path(__file__).parents[2]
BUSY_S = SLEEP_S = 5e-3


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
def neighbor(cores: Sequence[int]) -> Iterator[Neighbor]:
    """One process on each of these cores, none for none; yields once all of them run."""
    processes = []
    try:
        for core in cores:
            processes.append(start_child([sys.executable, "-m", "tests.perf.neighbor", str(core)], cwd=ROOT))
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


def compute_and_sleep(core: int) -> None:
    os.sched_setaffinity(0, {core})
    while True:
        end = time.process_time() + BUSY_S
        while time.process_time() < end:
            pass
        time.sleep(SLEEP_S)


if __name__ == "__main__":
    compute_and_sleep(int(sys.argv[1]))
