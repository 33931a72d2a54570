"""Cores and memory of a process within control groups, as machines lay them out."""

import os
from pathlib import Path

import psutil
import pytest

from engine import host

MIB = 1 << 20
V2 = "30 25 0:26 {top} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MEMORY = "35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V1_CPU = "32 31 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
V1_UNIFIED = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
OTHERS = "29 24 0:27 / / rw - ext4 /dev/sda1 rw\n34 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64 cores and 1 TiB, so that limits alone decide."""
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=1 << 40, total=1 << 40))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)


def lay_out(root: Path, mine: str, mounts: str, files: dict[str, object]) -> Path:
    for name, content in {"proc/self/cgroup": mine, "proc/self/mountinfo": OTHERS + mounts, **files}.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n" if not isinstance(content, str) else content)
    return root


def test_without_groups_the_machine_is_ours(tmp_path: Path) -> None:
    assert host.cores(tmp_path) == 64
    assert host.available_memory(tmp_path) == host.total_memory(tmp_path) == 1 << 40


def test_a_systemd_service_has_what_its_slice_leaves(tmp_path: Path) -> None:
    """The tightest limit counts, wherever above the process it is."""
    slice_ = "sys/fs/cgroup/user.slice/user-1000.slice"
    service = f"{slice_}/app.slice/redline.service"
    files = {
        f"{slice_}/cpu.max": "250000 100000\n",
        f"{slice_}/memory.max": 1000 * MIB,
        f"{slice_}/memory.current": 700 * MIB,
        f"{service}/cpu.max": "max 100000\n",
        f"{service}/memory.max": 800 * MIB,
        f"{service}/memory.current": 100 * MIB,
        "sys/fs/cgroup/user.slice/memory.max": "max\n",
    }
    mine = "0::/user.slice/user-1000.slice/app.slice/redline.service\n"
    root = lay_out(tmp_path, mine, V2.format(top="/"), files)
    assert host.cores(root) == 2
    assert host.available_memory(root) == 300 * MIB
    assert host.total_memory(root) == 800 * MIB


def test_memory_high_is_a_limit_and_idle_file_pages_are_room(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/memory.max": 1000 * MIB,
        "sys/fs/cgroup/memory.high": 900 * MIB,
        "sys/fs/cgroup/memory.current": 850 * MIB,
        "sys/fs/cgroup/memory.stat": f"anon {50 * MIB}\ninactive_file {600 * MIB}\nactive_file {MIB}\n",
    }
    root = lay_out(tmp_path, "0::/\n", V2.format(top="/"), files)
    assert host.available_memory(root) == 650 * MIB


@pytest.mark.parametrize(
    ("mine", "top"),
    [
        ("/docker/abc", "/docker/abc"),  # a container that sees the host's paths
        ("/", "/"),  # one with a view of its own
        ("/../..", "/"),  # a process moved out of that view
        ("/docker/abc", "/docker/another"),
    ],
)
def test_version_1_in_a_container(mine: str, top: str, tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": 350_000,
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": 100_000,
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 2000 * MIB,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 500 * MIB,
        "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {100 * MIB}\ninactive_file 0\n",
    }
    listed = f"9:name=systemd:/\n4:memory:{mine}\n2:cpu,cpuacct:{mine}\n0::/\n"
    root = lay_out(tmp_path, listed, V1_MEMORY.format(top=top) + V1_CPU.format(top=top) + V1_UNIFIED, files)
    assert host.cores(root) == 3
    assert host.available_memory(root) == 1600 * MIB
    assert host.total_memory(root) == 2000 * MIB


def test_version_1_walks_up_and_reads_no_limit_as_none(tmp_path: Path) -> None:
    memory, cpu = "sys/fs/cgroup/memory", "sys/fs/cgroup/cpu,cpuacct"
    files = {
        f"{cpu}/batch/cpu.cfs_quota_us": 150_000,
        f"{cpu}/batch/cpu.cfs_period_us": 50_000,
        f"{cpu}/batch/job/cpu.cfs_quota_us": -1,
        f"{cpu}/batch/job/cpu.cfs_period_us": 100_000,
        f"{memory}/batch/memory.limit_in_bytes": 1000 * MIB,
        f"{memory}/batch/memory.usage_in_bytes": 900 * MIB,
        f"{memory}/batch/job/memory.limit_in_bytes": 9223372036854771712,
        f"{memory}/batch/job/memory.usage_in_bytes": 10 * MIB,
    }
    listed = "4:memory:/batch/job\n2:cpu,cpuacct:/batch/job\n"
    root = lay_out(tmp_path, listed, V1_MEMORY.format(top="/") + V1_CPU.format(top="/"), files)
    assert host.cores(root) == 3
    assert host.available_memory(root) == 100 * MIB


def test_a_limit_around_a_container_that_it_does_not_see(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 100 * MIB,
        "sys/fs/cgroup/memory/memory.stat": f"cache 0\nhierarchical_memory_limit {400 * MIB}\n",
    }
    root = lay_out(tmp_path, "4:memory:/pod/one\n", V1_MEMORY.format(top="/pod/one"), files)
    assert host.available_memory(root) == 300 * MIB


def test_less_than_a_core_is_one_and_a_full_group_has_no_room(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/cpu.max": "50000 100000\n",
        "sys/fs/cgroup/memory.max": 10 * MIB,
        "sys/fs/cgroup/memory.current": 11 * MIB,
    }
    root = lay_out(tmp_path, "0::/\n", V2.format(top="/"), files)
    assert host.cores(root) == 1
    assert host.available_memory(root) == 0


def test_what_the_system_writes_otherwise_is_no_limit(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/cpu.max": "nonsense\n", "sys/fs/cgroup/memory.max": "\n"}
    root = lay_out(tmp_path, "not a line of this file\n0::/\n", V2.format(top="/") + "short - cgroup2\n", files)
    assert host.cores(root) == 64
    assert host.available_memory(root) == 1 << 40


def test_a_mount_with_a_blank_in_its_path(tmp_path: Path) -> None:
    files = {"sys/fs/c g/cpu.max": "400000 100000\n"}
    mount = "30 25 0:26 / /sys/fs/c\\040g rw - cgroup2 cgroup2 rw\n"
    assert host.cores(lay_out(tmp_path, "0::/\n", mount, files)) == 4


def test_this_machine() -> None:
    assert host.cores() >= 1
    assert 0 < host.available_memory() <= host.total_memory()


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        assert host.allow_open_files(300) == 300
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, hard)
        assert host.allow_open_files(200) == 200
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, hard), "it was lowered"
        if hard != resource.RLIM_INFINITY:
            assert host.allow_open_files(2 * hard) == hard
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_processes_of_one_container_share_a_host(tmp_path: Path) -> None:
    def machine(name: str, boot: str, namespace: str) -> Path:
        root = tmp_path / name
        (root / "proc/sys/kernel/random").mkdir(parents=True)
        (root / "proc/sys/kernel/random/boot_id").write_text(f"{boot}\n")
        (root / "proc/self/ns").mkdir(parents=True)
        (root / "proc/self/ns/cgroup").symlink_to(f"cgroup:[{namespace}]")
        return root

    first = host.shared_host(machine("a", "boot 1", "4026531835"))
    assert host.shared_host(machine("b", "boot 1", "4026531835")) == first
    assert host.shared_host(machine("container", "boot 1", "4026532000")) != first
    assert host.shared_host(machine("another", "boot 2", "4026531835")) != first
