"""What a server holds while it runs, and what it leaves behind when it has ended."""

import re
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import psutil

from tests.serving import Served

SETTLE_S = 20.0  # how long what a fault left under way may take to be over


@dataclass(frozen=True)
class Held:
    """Counts of what a server has to give back."""

    blocks: int = 0
    slots: int = 0  # requests that run or wait
    tasks: int = 0
    descriptors: int = 0
    processes: int = 0
    shared_memory: int = 0  # files in /dev/shm, and socket folders

    def over(self, before: "Held") -> dict[str, int]:
        """What is held beyond an earlier count, by kind; never negative."""
        return {name: max(0, value - getattr(before, name)) for name, value in asdict(self).items()}


KINDS = tuple(field.name for field in fields(Held))


def family(served: Served) -> list[psutil.Process]:
    """All processes of a server."""
    process = psutil.Process(served.process.pid)
    return [process, *process.children(recursive=True)]


def shared_memory(folder: Path) -> int:
    """Files in shared memory, and what lies in the temporary folder that the server was given."""
    memory = Path("/dev/shm")
    named = list(memory.glob("redline-*")) if memory.is_dir() else []
    return len(named) + sum(1 for path in folder.iterdir() if path.name.startswith("redline"))


def held(served: Served, folder: Path) -> Held:
    """What a running server holds now."""
    metric = served.metric
    sizes = re.findall(r'num_gpu_blocks="(\d+)"', served.client.get("/metrics").text)
    processes = family(served)
    return Held(
        blocks=round(metric("vllm:kv_cache_usage_perc") * int(sizes[0])),
        slots=int(metric("vllm:num_requests_running") + metric("vllm:num_requests_waiting")),
        tasks=int(metric("redline:tasks")),
        descriptors=sum(process.num_fds() for process in processes),
        processes=len(processes),
        shared_memory=shared_memory(folder),
    )


def leaked(served: Served, folder: Path, before: Held) -> dict[str, int]:
    """What a running server doesn't give back within SETTLE_S, by kind."""
    deadline = time.monotonic() + SETTLE_S
    while any((found := held(served, folder).over(before)).values()) and time.monotonic() < deadline:
        time.sleep(0.25)
    return found


def left_behind(processes: list[psutil.Process], folder: Path) -> dict[str, int]:
    """What a server that ended left, by kind."""
    _, alive = psutil.wait_procs(processes, timeout=SETTLE_S)
    return asdict(Held(processes=len(alive), shared_memory=shared_memory(folder)))
