"""Files of KV blocks, in the format of `engine.kv_format`: one for each, in a folder that ends with the engine."""

import contextlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from engine.errors import ConfigError, RedlineError, cause_of
from engine.kv_format import HEADER_BYTES, TruncatedBlockError, pack_header, read_header
from engine.kv_spill import FLAG
from engine.owned_folder import OwnedFolder

PREFIX = "redline-kv-"


class BlockMemory(Protocol):
    """Host blocks, see `engine.host_blocks`."""

    def parts(self, block: int) -> Sequence[memoryview]:
        """The bytes of a block; writable."""
        ...


def open_folder(path: str) -> OwnedFolder:
    """A folder for the files of one core or rank, which also removes those of processes that were killed.

    Raises ConfigError if the path can't be used.
    """
    try:
        os.makedirs(path, exist_ok=True)
        return OwnedFolder(path, PREFIX)
    except OSError as error:
        raise ConfigError(f"{FLAG} disk=: {path} can't be used: {error.strerror or error}") from error


def check_folder(path: str) -> None:
    """Raise ConfigError if `open_folder` would."""
    open_folder(path).remove()


class BlockFiles:
    """Implements `engine.core.disk_tier.Files` for the process that calls it: one thread reads, one writes and removes.

    Args:
        folder: exists.
        host: the host blocks.
        fingerprint: of the engine's `KVLayout`.
    """

    def __init__(self, folder: str, host: BlockMemory, fingerprint: bytes):
        self._folder, self._host, self._fingerprint = folder, host, fingerprint
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="kv-reads")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kv-writes")

    def path(self, key: bytes) -> str:
        return os.path.join(self._folder, key.hex())

    def write(self, key: bytes, block: int, done: Callable[[str], None]) -> None:
        self._writer.submit(self._report, self._write, key, block, done)

    def read(self, key: bytes, block: int, done: Callable[[str], None]) -> None:
        self._reader.submit(self._report, self._read, key, block, done)

    def remove(self, key: bytes) -> None:
        self._writer.submit(self._remove, key)

    def close(self) -> None:
        """Wait for what has begun; the rest is dropped."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._writer.shutdown(wait=True, cancel_futures=True)

    def _report(self, run: Callable[[bytes, int], None], key: bytes, block: int, done: Callable[[str], None]) -> None:
        """Run on a thread. Any error is the cause that is reported: somebody waits for it."""
        cause = ""
        try:
            run(key, block)
        except RedlineError as error:
            cause = f"{self.path(key)} can't be used: {error}"
        except OSError as error:
            cause = f"{self.path(key)}: {error.strerror or cause_of(error)}"
        except Exception as error:
            cause = f"{self.path(key)}: {cause_of(error)}"
        done(cause)

    def _write(self, key: bytes, block: int) -> None:
        parts = self._host.parts(block)
        with open(self.path(key), "wb", buffering=0) as file:
            for piece in (memoryview(pack_header(self._fingerprint, key, parts)), *parts):
                left = piece
                while left:
                    left = left[file.write(left) :]

    def _read(self, key: bytes, block: int) -> None:
        parts = self._host.parts(block)
        with open(self.path(key), "rb", buffering=0) as file:
            header = read_header(file.read(HEADER_BYTES), self._fingerprint, key)
            for part in parts:
                left = part
                while left:
                    count = file.readinto(left)
                    if not count:
                        raise TruncatedBlockError(f"it ends {len(left)} bytes before a part of the KV block does")
                    left = left[count:]
            if file.read(1):
                raise TruncatedBlockError("it is longer than its KV block")
        header.check(parts)

    def _remove(self, key: bytes) -> None:
        with contextlib.suppress(OSError):  # it could not be written, or the folder is gone
            os.unlink(self.path(key))
