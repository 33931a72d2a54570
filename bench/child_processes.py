"""Processes that end with the one that started them, however that ends. Elsewhere than on Linux nothing is done."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
# Loaded here: between fork and exec only the call itself is safe.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Have the system send this process a signal when its parent ends; SIGKILL also ends a stopped process.

    Linux sends it when the thread that started this process ends, so that one must live as long as this process shall.

    Args:
        parent: process id of the parent; if that has ended before, this process ends now.
        number: the signal.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def before_exec(number: int = signal.SIGKILL) -> Callable[[], None]:
    """A `preexec_fn` for a process that shall end with this one; see `end_with_parent`.

    It also resets SIGINT: a background job of a shell ignores it, and its children inherit that.
    """
    parent = os.getpid()

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        end_with_parent(parent, number)

    return prepare


class GroupEnd:
    """Sends a signal to a process group once this process has ended, until `close`.

    For what the death signal of its first process does not do: end the others, or continue those that are stopped.
    """

    def __init__(self, group: int, number: signal.Signals):
        # Its stdin ends with this process. In a session of its own it outlives a kill of this process's group.
        script = 'read -r _; kill -s "$1" -- "-$2"'
        name = number.name.removeprefix("SIG")
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", script, "group-end", name, str(group)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # the group may have ended
            start_new_session=True,
        )

    def close(self) -> None:
        self._shell.kill()
        self._shell.wait()
        assert self._shell.stdin is not None
        self._shell.stdin.close()
