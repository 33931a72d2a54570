"""The folder of an engine's sockets: its path is short enough for them, and the next start removes it after a kill."""

import contextlib
import os
import tempfile
from collections.abc import Iterator

from engine.errors import RedlineError
from engine.owned_folder import OwnedFolder

PREFIX = "redline-"
# A Unix socket's path has at most 107 bytes. The folder's own name and the longest file name (30) are subtracted.
LONGEST_PARENT = 107 - len("/redline-12345678/") - 30


class SocketFolder(OwnedFolder):
    """A new folder for sockets. Raises RedlineError if none can be made."""

    def __init__(self) -> None:
        super().__init__(find_parent(), PREFIX)


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
