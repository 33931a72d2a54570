"""Processes that a benchmark starts: none outlives it, however it ends. Linux only, as all that reads /proc."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def start_child(command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
    """As subprocess.Popen, for a process that is killed when this one ends.

    Call it in a thread that lives as long as the process shall: Linux sends the signal when that thread ends. Processes
    that the process starts are not killed; see GroupEnd.
    """
    return subprocess.Popen(command, preexec_fn=_before_exec(os.getpid()), **options)


def run_child(command: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[Any]":
    """As subprocess.run, for a process that is killed when this one ends."""
    return subprocess.run(command, preexec_fn=_before_exec(os.getpid()), **options)


def end_with_parent() -> None:
    """In a process of `multiprocessing`: have it killed when the process that started it ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    _end_with(parent.pid)


def _end_with(parent: int) -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:  # it has ended before
        os.kill(os.getpid(), signal.SIGKILL)


class GroupEnd:
    """Kills a process group once this process has ended, stopped processes included; until `close`."""

    def __init__(self, group: int):
        # Its stdin ends with this process. In a session of its own it outlives a kill of this process's group.
        script = 'read -r _; kill -s KILL -- "-$1"'
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", script, "group-end", str(group)], stdin=subprocess.PIPE, start_new_session=True
        )

    def close(self) -> None:
        self._shell.kill()
        self._shell.wait()
        assert self._shell.stdin is not None
        self._shell.stdin.close()


def _before_exec(parent: int) -> Callable[[], None]:
    """Between fork and exec. A background job of a shell ignores SIGINT, and its children inherit that: it is reset."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _end_with(parent)

    return prepare
