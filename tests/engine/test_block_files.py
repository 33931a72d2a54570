"""Files of KV blocks on a real file system: only what was written is ever read."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import pytest

from engine.block_files import BlockFiles
from engine.host_blocks import HostBlocks
from engine.kv_format import HEADER_BYTES

HERE, ELSEWHERE = b"fingerprint here", b"fingerprint else"
KEY = b"the key of block"
CONTENT = [bytes(range(60)), bytes(range(60, 200))]  # of each rank


@pytest.fixture
def host() -> HostBlocks:
    made = HostBlocks(4, (60, 140))
    for part, content in zip(made.parts(1), CONTENT, strict=True):
        part[:] = content
    return made


@pytest.fixture
def files(host: HostBlocks, tmp_path: Path) -> Iterator[BlockFiles]:
    made = BlockFiles(str(tmp_path), host, HERE)
    yield made
    made.close()


def cause_of(operation: Callable[[bytes, int, Callable[[str], None]], None], block: int, key: bytes = KEY) -> str:
    """What an operation reports."""
    causes: list[str] = []
    ended = Event()

    def done(cause: str) -> None:
        causes.append(cause)
        ended.set()

    operation(key, block, done)
    assert ended.wait(30)
    return causes[0]


def test_a_block_is_read_into_another_host_block(files: BlockFiles, host: HostBlocks) -> None:
    assert cause_of(files.write, 1) == ""
    assert os.path.getsize(files.path(KEY)) == HEADER_BYTES + 200
    assert cause_of(files.read, 3) == ""
    assert [bytes(part) for part in host.parts(3)] == CONTENT


@pytest.mark.parametrize("at", [0, 5, 30, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 150, HEADER_BYTES + 199])
def test_a_corrupt_file_is_refused(at: int, files: BlockFiles) -> None:
    cause_of(files.write, 1)
    path = Path(files.path(KEY))
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)
    assert cause_of(files.read, 2).startswith(f"{path} can't be used: ")


@pytest.mark.parametrize("size", [0, 10, HEADER_BYTES, HEADER_BYTES + 99, HEADER_BYTES + 199, HEADER_BYTES + 201])
def test_a_file_of_another_length_is_refused(size: int, files: BlockFiles) -> None:
    cause_of(files.write, 1)
    os.truncate(files.path(KEY), size)
    cause = cause_of(files.read, 2)
    if size > HEADER_BYTES + 200:
        assert cause.endswith("it is longer than its KV block")
    else:
        assert "instead of" in cause or "bytes before a part of the KV block does" in cause


def test_the_file_of_another_block_is_refused(files: BlockFiles) -> None:
    cause_of(files.write, 1)
    os.rename(files.path(KEY), files.path(b"another key"))
    assert f"the KV block is {KEY.hex()} instead of {b'another key'.hex()}" in cause_of(files.read, 2, b"another key")


def test_the_file_of_another_engine_is_refused(files: BlockFiles, host: HostBlocks, tmp_path: Path) -> None:
    cause_of(files.write, 1)
    other = BlockFiles(str(tmp_path), host, ELSEWHERE)
    assert "from an engine with another model" in cause_of(other.read, 2)
    other.close()


def test_a_missing_file_and_a_missing_folder_are_named(files: BlockFiles, host: HostBlocks, tmp_path: Path) -> None:
    assert cause_of(files.read, 2) == f"{files.path(KEY)}: No such file or directory"
    nowhere = BlockFiles(str(tmp_path / "nowhere"), host, HERE)
    assert cause_of(nowhere.write, 1) == f"{nowhere.path(KEY)}: No such file or directory"
    nowhere.close()


def test_removals_and_writes_are_in_order(files: BlockFiles) -> None:
    files.remove(KEY)  # there is none
    cause_of(files.write, 1)
    files.remove(KEY)
    assert cause_of(files.write, 1) == ""
    assert os.path.exists(files.path(KEY))
    files.remove(KEY)
    cause_of(files.write, 1, b"a later one")
    assert not os.path.exists(files.path(KEY))
