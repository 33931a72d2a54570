"""A neighbor on a machine: one process on each core, which always computes or only half of the time.

    half   computes for 5 ms and then sleeps for 5 ms, over and over
    busy   computes all the time

Beside others it gets what the system's scheduler gives it.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from bench.child_processes import end_with_parent
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
    if not cores:
        yield Neighbor([])
        return
    command = [sys.executable, "-m", "tests.perf.neighbor", kind, *map(str, cores)]
    # As one program in a session of its own, as the engines are: schedulers share cores among sessions first.
    process = start_child(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    try:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        if len(pids) != len(cores):
            sys.exit("the neighbor did not start")
        yield Neighbor(pids)
        if process.poll() is not None:
            sys.exit(f"the neighbor ended by itself, with exit code {process.returncode}")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def compute(core: int, pause_s: float) -> NoReturn:
    os.sched_setaffinity(0, {core})
    while True:
        end = time.process_time() + BUSY_S
        while time.process_time() < end:
            pass
        if pause_s:
            time.sleep(pause_s)


def start(kind: str, cores: Sequence[int]) -> None:
    """Compute on the first core, and in a child on each other one; says the ids of all processes."""
    parent, pids = os.getpid(), []
    for core in cores[1:]:
        pid = os.fork()
        if pid == 0:
            end_with_parent(parent)
            compute(core, PAUSE_S[kind])
        pids.append(pid)
    print(parent, *pids, flush=True)
    compute(cores[0], PAUSE_S[kind])


if __name__ == "__main__":
    start(sys.argv[1], [int(core) for core in sys.argv[2:]])
