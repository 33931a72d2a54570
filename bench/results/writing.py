"""Writes files atomically; an error is one line that names the flag."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.errors import BenchError

_PROBE_BYTES = 65_536  # an empty file can be written to a full disk


class CannotWriteError(BenchError):
    """Results cannot be written; `answer` is what was found until then."""

    def __init__(self, message: str, answer: Any = None):
        super().__init__(message)
        self.answer = answer


@contextlib.contextmanager
def writing(path: Path, flag: str) -> Iterator[None]:
    """Turn an OSError into a CannotWriteError that names the path, the cause and the flag."""
    try:
        yield
    except OSError as error:
        cause = (error.strerror or str(error)).rpartition("] ")[2]  # pyarrow's errors only have a text
        raise CannotWriteError(f"{path} cannot be written: {cause} ({flag})") from None


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file under another name, then rename it to `path`; removes it if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def check_folder(folder: Path, flag: str) -> None:
    """Raise CannotWriteError unless files can be written to the folder; the check leaves no files behind.

    It writes a file, since permissions do not show a full disk or a read-only file system.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    probe = folder / f".redline-{os.getpid()}"
    with writing(folder, flag):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"\0" * _PROBE_BYTES)
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)
            for path in missing:
                with contextlib.suppress(OSError):
                    path.rmdir()
