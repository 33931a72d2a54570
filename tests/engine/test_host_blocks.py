"""Host blocks: what one process writes, the others read."""

import subprocess
import sys

import pytest

from engine.errors import ConfigError
from engine.host_blocks import HostBlocks, map_rank

WRITE = """
import sys
from engine.host_blocks import map_rank
map_rank(sys.argv[1], 1, 3, (6, 10))[2] = 7
"""


def test_ranks_have_their_own_parts() -> None:
    sizes = 10, 4, 7
    host = HostBlocks(3, sizes)
    for rank in range(3):
        map_rank(host.path, rank, 3, sizes)[1] = rank + 1
    assert [bytes(part) for part in host.parts(1)] == [b"\1" * 10, b"\2" * 4, b"\3" * 7]
    assert [bytes(part) for block in (0, 2) for part in host.parts(block)] == [bytes(size) for size in sizes] * 2
    host.parts(2)[1][:] = b"x" * 4
    assert bytes(map_rank(host.path, 1, 3, sizes)[2]) == b"x" * 4


def test_another_process_maps_them() -> None:
    host = HostBlocks(3, (6, 10))
    subprocess.run([sys.executable, "-c", WRITE, host.path], check=True, timeout=60)
    assert [bytes(part) for part in host.parts(2)] == [bytes(6), b"\7" * 10]


def test_a_system_without_such_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.memfd_create")
    with pytest.raises(ConfigError, match="--kv-spill needs Linux"):
        HostBlocks(1, (1,))
