"""Host blocks and files of KV blocks that ranks on other machines keep, each those of its own part."""

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

from engine.block_orders import (
    BlockOrder,
    OpenBlocks,
    ReadBlock,
    RemoveBlock,
    WriteBlock,
    decode_done,
    encode_blocks,
)
from engine.errors import ConfigError


class NamedRank(Protocol):
    name: str


class BlockRanks(Protocol):
    """The executor of the ranks; see `engine.worker.multiprocess`."""

    ended: "Future[None]"  # fails with the cause if the ranks end unexpectedly

    @property
    def ranks(self) -> Sequence[NamedRank]: ...

    def order_blocks(self, order: bytes) -> None:
        """Send an encoded BlockOrder to all ranks, after the steps that were submitted."""
        ...

    def listen_for_blocks(self, listener: Callable[[int, bytes], None]) -> None:
        """Have a thread call `listener` with each encoded BlocksDone and the number of its rank."""
        ...


@dataclass(slots=True)
class _Awaited:
    """An order: how many ranks have yet to answer, the first cause of those that failed, what is called at the end."""

    missing: int
    done: Callable[[str], None]
    cause: str = ""


class RankFiles:
    """Implements `engine.core.disk_tier.Files`. The constructor waits until all ranks have their memory and folders.

    Args:
        executor: of the ranks.
        num_blocks: host blocks.
        fingerprint: of the engine's `KVLayout`.
        disk_path: below which each rank has a folder on its machine; empty: no files.

    Raises ConfigError with the cause of a rank, or the error with which the ranks have ended.
    """

    def __init__(self, executor: BlockRanks, num_blocks: int, fingerprint: bytes, disk_path: str):
        self._executor = executor
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._awaited: dict[int, _Awaited] = {}
        executor.listen_for_blocks(self._note)
        opened: Future[str] = Future()
        self._order(lambda number: OpenBlocks(number, num_blocks, fingerprint, disk_path), opened.set_result)
        either: list[Future[Any]] = [opened, executor.ended]
        wait(either, return_when=FIRST_COMPLETED)
        if not opened.done():
            executor.ended.result()
        if cause := opened.result():
            raise ConfigError(cause)

    def write(self, key: bytes, block: int, done: Callable[[str], None]) -> None:
        self._order(lambda number: WriteBlock(number, key, block), done)

    def read(self, key: bytes, block: int, done: Callable[[str], None]) -> None:
        self._order(lambda number: ReadBlock(number, key, block), done)

    def remove(self, key: bytes) -> None:
        self._executor.order_blocks(encode_blocks(RemoveBlock(key)))

    def _order(self, make: Callable[[int], BlockOrder], done: Callable[[str], None]) -> None:
        number = next(self._numbers)
        with self._lock:
            self._awaited[number] = _Awaited(len(self._executor.ranks), done)
        self._executor.order_blocks(encode_blocks(make(number)))

    def _note(self, rank: int, body: bytes) -> None:
        """A rank has answered; called by a thread."""
        answer = decode_done(body)
        with self._lock:
            awaited = self._awaited[answer.number]
            awaited.missing -= 1
            if answer.cause and not awaited.cause:
                awaited.cause = f"{self._executor.ranks[rank].name}: {answer.cause}"
            if awaited.missing:
                return
            del self._awaited[answer.number]
        awaited.done(awaited.cause)
