"""The folder of an engine's sockets: its path is short enough for them, and the next start removes it after a kill."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from engine.errors import RedlineError

PREFIX = "redline-"
LOCK = "owner.lock"
# A Unix socket's path has at most 107 bytes. The folder's own name and the longest file name (30) are subtracted.
LONGEST_PARENT = 107 - len("/redline-12345678/") - 30


class SocketFolder:
    """A new folder. A lock that ends with this process marks it as in use. Raises RedlineError if none can be made."""

    def __init__(self) -> None:
        self._closing = threading.Lock()
        parent = find_parent()
        remove_stale(parent)
        self.path = tempfile.mkdtemp(prefix=PREFIX, dir=parent)
        # Renamed once it is locked, so that no process finds it unlocked while its owner runs.
        unlocked = os.path.join(self.path, LOCK + ".new")
        self._lock = os.open(unlocked, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.rename(unlocked, os.path.join(self.path, LOCK))

    def remove(self) -> None:
        """Remove it with all in it; safe to call twice, and from two threads at once."""
        shutil.rmtree(self.path, ignore_errors=True)
        with self._closing:
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1


def find_parent() -> str:
    """The temporary directory, or another one if its path is too long for sockets."""
    for parent in candidates():
        if len(os.fsencode(parent)) <= LONGEST_PARENT and os.access(parent, os.W_OK | os.X_OK):
            return parent
    raise RedlineError(
        f"no writable temporary directory has a path of at most {LONGEST_PARENT} bytes, the limit for sockets: "
        "set TMPDIR to one that has"
    )


def candidates() -> Iterator[str]:
    with contextlib.suppress(FileNotFoundError):  # none can be written to
        yield tempfile.gettempdir()
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        yield runtime
    yield from ("/tmp", "/var/tmp")


def remove_stale(parent: str) -> None:
    """Remove the folders of engines whose process was killed: their locks are free."""
    for lock in Path(parent).glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError):  # in use, another user's, or removed meanwhile
            descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(descriptor)
