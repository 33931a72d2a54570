"""The cores and the memory of the host that this process may use, within the limits of its control groups.

Limits are read from the process's group and from all groups that contain it (a container, a systemd service in its
slice, a pod), with version 1, version 2 or both mounted.
"""

import contextlib
import math
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path("/")


def cores(root: Path = ROOT) -> int:
    """Cores that this process may use: its CPU affinity, limited by the lowest CPU quota; at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = (quota for folder in _groups("cpu", root) if (quota := _quota(folder)) is not None)
    return max(1, int(min(count, *quotas, math.inf)))


def processor(root: Path = ROOT) -> str:
    """The name of the processor."""
    names = [line.split(":", 1)[1].strip() for line in _lines(root / "proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def threads_per_rank(total_ranks: int, usable_cores: int | None = None) -> int:
    """Compute threads of each rank: the usable cores, divided by the ranks of all replicas."""
    return max(1, (cores() if usable_cores is None else usable_cores) // total_ranks)


def available_memory(root: Path = ROOT) -> int:
    """Bytes that the process can still allocate: what is available on the host, and within every memory limit."""
    free = (left for folder in _groups("memory", root) if (left := _free_memory(folder)) is not None)
    return max(0, min(psutil.virtual_memory().available, *free, 1 << 62))


def total_memory(root: Path = ROOT) -> int:
    """The host's memory in bytes, or the lowest memory limit."""
    limits = (limit for folder in _groups("memory", root) if (limit := _memory_limit(folder)) is not None)
    return min(psutil.virtual_memory().total, *limits, 1 << 62)


def shared_host(root: Path = ROOT) -> str:
    """What processes have in common that share cores and memory: the running system and, in containers, the container.

    Several nodes of a cluster may be on one host. A container has a namespace of control groups and limits of its own.
    """
    boot = "".join(_lines(root / "proc/sys/kernel/random/boot_id")) or platform.node()
    with contextlib.suppress(OSError):
        return f"{boot} {os.readlink(root / 'proc/self/ns/cgroup')}"
    return boot


def allow_open_files(count: int) -> int:
    """Raise the soft limit of open files of this process, and of those that it starts, to `count` as far as allowed.

    Shells often set 1,024, and each connection of a client is an open file. Returns how many of `count` may be open.
    """
    try:
        import resource
    except ImportError:  # not a Unix
        return count
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ValueError, OSError):
        return soft
    return wanted


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the groups that limit this process in a controller: its own, then those that contain it."""
    mine: dict[str, str] = {}  # path of the group within its hierarchy, by controller; "" stands for version 2
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        mine |= dict.fromkeys(controllers.split(","), path)
    for line in _lines(root / "proc/self/mountinfo"):
        # ID PARENT DEVICE ROOT MOUNTPOINT OPTIONS… - KIND SOURCE SUPEROPTIONS
        before, _, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(), (*after.split(), "", "", "")[:3]
        version_1 = kind == "cgroup" and controller in options.split(",")
        found = mine.get(controller if version_1 else "")
        if found is not None and (version_1 or kind == "cgroup2") and len(fields) > 4:
            top, mount = _unescaped(fields[3]), root / _unescaped(fields[4]).lstrip("/")
            yield from _upward(mount, _within(found, top))


def _within(path: str, top: str) -> str:
    """The path of a group below the mount's top; empty if a container does not see it under that path."""
    top = top.rstrip("/")
    return "" if ".." in path.split("/") or not f"{path}/".startswith(f"{top}/") else path[len(top) :].strip("/")


def _upward(mount: Path, inner: str) -> Iterator[Path]:
    folder = mount / inner
    while folder != mount:
        yield folder
        folder = folder.parent
    yield mount


def _quota(folder: Path) -> float | None:
    """The CPU quota of a group in cores; None without a limit."""
    found = " ".join(_lines(folder / "cpu.max")).split()
    if not found:
        found = [*_lines(folder / "cpu.cfs_quota_us"), *_lines(folder / "cpu.cfs_period_us")]
    if len(found) != 2 or not all(re.fullmatch(r"\d+", one) for one in found) or not int(found[1]):
        return None  # "max", or -1 in version 1
    return int(found[0]) / int(found[1])


def _memory_limit(folder: Path) -> int | None:
    """The memory limit of a group in bytes, or None. memory.high counts: above it the system slows processes down."""
    files = ("memory.max", "memory.high", "memory.limit_in_bytes")
    limits = [limit for file in files if (limit := _number(folder / file)) is not None]
    around = _stat(folder).get("hierarchical_memory_limit")  # version 1: includes groups that a container does not see
    return min(limits if around is None else [*limits, around], default=None)


def _free_memory(folder: Path) -> int | None:
    """Bytes left under a group's limit, or None without a limit. Inactive page cache counts as free."""
    limit = _memory_limit(folder)
    used = next(
        (n for file in ("current", "usage_in_bytes") if (n := _number(folder / f"memory.{file}")) is not None), 0
    )
    if limit is None:
        return None
    stat = _stat(folder)
    return limit - used + min(used, stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def _stat(folder: Path) -> dict[str, int]:
    pairs = (line.split() for line in _lines(folder / "memory.stat"))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _number(file: Path) -> int | None:
    text = " ".join(_lines(file))
    return int(text) if text.isdigit() else None


def _lines(file: Path) -> list[str]:
    """Lines of a file; none if it does not exist or can't be read."""
    try:
        return file.read_text().splitlines()
    except (OSError, ValueError):
        return []


def _unescaped(path: str) -> str:
    """A path of mountinfo, in which spaces and the like are escaped as octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
