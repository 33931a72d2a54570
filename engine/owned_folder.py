"""Folders that end with their owner: a lock marks them as in use, and what a killed process left is removed later."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
from pathlib import Path

LOCK = "owner.lock"


class OwnedFolder:
    """A new folder in `parent`. A lock that ends with this process marks it as in use."""

    def __init__(self, parent: str, prefix: str) -> None:
        self._closing = threading.Lock()
        remove_stale(parent, prefix)
        self.path = tempfile.mkdtemp(prefix=prefix, dir=parent)
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


def remove_stale(parent: str, prefix: str) -> None:
    """Remove the folders whose process was killed: their locks are free."""
    for lock in Path(parent).glob(f"{prefix}*/{LOCK}"):
        with contextlib.suppress(OSError):  # in use, another user's, or removed meanwhile
            descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(descriptor)
