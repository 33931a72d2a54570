"""Host blocks and files of two ranks with memory and folders of their own, ordered by a core."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.rank_files import RankFiles
from engine.errors import ConfigError, EngineDeadError
from engine.messages import COPY_IN, COPY_OUT
from engine.worker.kv_blocks import Bytes, CPUBlocks
from engine.worker.own_blocks import OwnBlocks

BLOCKS, HOST_BLOCKS, SIZES = 3, 4, (40, 24)  # bytes of a block's parts on each rank
PATIENCE_S = 60.0
FINGERPRINT = b"f" * 16


@dataclass
class Rank:
    """Part of the caches of one rank, and what executes its orders."""

    name: str
    caches: list[Bytes]
    blocks: CPUBlocks
    own: OwnBlocks


class Ranks:
    """The executor: orders are executed where they are given, in the order of the ranks."""

    def __init__(self) -> None:
        self.ended: Future[None] = Future()
        self.ranks: list[Rank] = []
        self.is_silent = False
        self._listener: Callable[[int, bytes], None] | None = None
        for number, size in enumerate(SIZES):
            caches: list[Bytes] = [np.zeros((BLOCKS, size // 2), np.uint8) for _ in range(2)]
            blocks = CPUBlocks(caches, number)
            own = OwnBlocks(number, blocks, self._sender(number))
            self.ranks.append(Rank(f"rank {number} on node 10.0.0.{number}", caches, blocks, own))

    def _sender(self, number: int) -> Callable[[bytes], None]:
        def send(body: bytes) -> None:
            assert self._listener is not None
            self._listener(number, body)

        return send

    def order_blocks(self, order: bytes) -> None:
        for rank in self.ranks:
            if not self.is_silent:
                rank.own.execute(order)

    def listen_for_blocks(self, listener: Callable[[int, bytes], None]) -> None:
        self._listener = listener

    def close(self) -> None:
        for rank in self.ranks:
            rank.own.close()

    def copy(self, direction: int, block: int, host_block: int) -> None:
        for rank in self.ranks:
            rank.blocks.copy(np.array([[direction, block, host_block]], np.int32))

    def content(self, block: int) -> list[bytes]:
        return [cache[block].tobytes() for rank in self.ranks for cache in rank.caches]

    def fill(self, block: int, seed: int) -> list[bytes]:
        luck = np.random.default_rng(seed)
        for rank in self.ranks:
            for cache in rank.caches:
                cache[block] = luck.integers(0, 256, cache.shape[1], dtype=np.uint8)
        return self.content(block)


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    made = Ranks()
    yield made
    made.close()


def cause_of(operation: Callable[..., None], *arguments: Any) -> str:
    """What an operation reports, once."""
    causes: list[str] = []
    ended = Event()

    def done(cause: str) -> None:
        causes.append(cause)
        ended.set()

    operation(*arguments, done)
    assert ended.wait(PATIENCE_S)
    assert len(causes) == 1
    return causes[0]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), host_blocks=st.permutations(range(HOST_BLOCKS)))
def test_a_block_comes_back_from_the_files_of_all_ranks(
    seed: int, host_blocks: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("files")
    ranks = Ranks()
    files = RankFiles(ranks, HOST_BLOCKS, FINGERPRINT, str(folder))
    content = ranks.fill(1, seed)
    ranks.copy(COPY_OUT, 1, host_blocks[0])
    assert cause_of(files.write, b"key", host_blocks[0]) == ""
    ranks.fill(1, seed + 1)
    ranks.copy(COPY_OUT, 1, host_blocks[0])
    assert cause_of(files.read, b"key", host_blocks[1]) == ""
    ranks.copy(COPY_IN, 2, host_blocks[1])
    assert ranks.content(2) == content
    assert len(list(folder.glob("*/*"))) == 2 * len(SIZES), "a file and a lock for each rank"
    files.remove(b"key")
    assert cause_of(files.write, b"other", host_blocks[0]) == ""  # which comes after the removal
    assert cause_of(files.read, b"key", host_blocks[1]).startswith("rank ")
    ranks.close()
    assert not os.listdir(folder)


@pytest.mark.parametrize("victim", range(len(SIZES)))
@pytest.mark.parametrize("fault", ["changed", "truncated", "of another rank", "gone"])
def test_a_file_that_one_rank_can_not_use_fails_the_block_and_is_named(
    victim: int, fault: str, ranks: Ranks, tmp_path: Path
) -> None:
    files = RankFiles(ranks, HOST_BLOCKS, FINGERPRINT, str(tmp_path))
    ranks.fill(1, 1)
    ranks.copy(COPY_OUT, 1, 0)
    assert cause_of(files.write, b"key", 0) == ""
    paths: dict[int, Path] = {os.path.getsize(path): path for path in tmp_path.glob(f"*/{b'key'.hex()}")}
    mine, other = (paths[size] for size in sorted(paths, reverse=victim == 0))
    data = bytearray(mine.read_bytes())
    if fault == "changed":
        data[-1] ^= 1
        mine.write_bytes(data)
    elif fault == "truncated":
        os.truncate(mine, len(data) - 1)
    elif fault == "of another rank":
        mine.write_bytes(other.read_bytes())
    else:
        mine.unlink()
    cause = cause_of(files.read, b"key", 2)
    assert cause.startswith(f"{ranks.ranks[victim].name}: {mine}")
    assert cause_of(files.write, b"key", 0) == ""
    assert cause_of(files.read, b"key", 2) == ""


def test_ranks_without_files_have_memory(ranks: Ranks) -> None:
    RankFiles(ranks, HOST_BLOCKS, FINGERPRINT, "")
    content = ranks.fill(0, 1)
    ranks.copy(COPY_OUT, 0, 3)
    ranks.copy(COPY_IN, 2, 3)
    assert ranks.content(2) == content


def test_a_rank_that_can_not_open_is_named(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^rank 0 on node 10.0.0.0: --kv-spill disk=: .*file can't be used"):
        RankFiles(ranks, HOST_BLOCKS, FINGERPRINT, str(tmp_path / "file"))


def test_more_memory_than_there_is_is_an_error(ranks: Ranks) -> None:
    with pytest.raises(ConfigError, match=r"^rank 0 on node 10.0.0.0: --kv-spill host=: .* can't be allocated"):
        RankFiles(ranks, 1 << 58, FINGERPRINT, "")


def test_ranks_that_end_end_the_wait(ranks: Ranks) -> None:
    ranks.is_silent = True
    ranks.ended.set_exception(EngineDeadError("rank 1 was killed"))
    with pytest.raises(EngineDeadError, match="rank 1 was killed"):
        RankFiles(ranks, HOST_BLOCKS, FINGERPRINT, "")
