"""Child processes: framed orders on stdin, how a child ended, and a child that never outlives its parent.

stdin stays open as long as the parent lives, so that a child whose parent is gone ends too. Plain child processes
instead of `multiprocessing`: a user's script needs no `__main__` guard.
"""

import faulthandler
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, BinaryIO

import msgspec

import engine.errors
from engine.errors import EngineDeadError, RedlineError, cause_of


class Failure(msgspec.Struct, tag="failure"):
    """Why a child ended: the class of a RedlineError where it was one."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: RedlineError) -> "Failure":
        return cls(type(error).__name__, str(error))

    def error(self) -> RedlineError:
        kind = getattr(engine.errors, self.kind, EngineDeadError)
        result: RedlineError = kind(self.message)
        return result


# ----------------------------------------------------------------------------------------------------- in the parent


def spawn(module: str, orders: msgspec.Struct, pass_fds: Sequence[int] = ()) -> "subprocess.Popen[bytes]":
    """Start `python -m module` with its orders on stdin, which stays open."""
    child = subprocess.Popen([sys.executable, "-m", module], stdin=subprocess.PIPE, pass_fds=tuple(pass_fds))
    assert child.stdin is not None
    try:
        child.stdin.write(framed(orders))
        child.stdin.flush()
    except BrokenPipeError:
        pass  # it ended already: whoever waits for its report learns how
    return child


def how_it_ended(child: "subprocess.Popen[bytes]", advice_if_killed: str) -> str:
    """The end of a sentence about a child that has ended."""
    code = child.returncode
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = f"; if the system ran out of memory, {advice_if_killed}" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


# ------------------------------------------------------------------------------------------------------ in the child


def leave_signals_to_parent() -> None:
    """A Ctrl-C reaches the whole terminal group; the parent decides when its children end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _ignore)
    # The stacks of all threads, also of one that never comes back to Python.
    faulthandler.register(signal.SIGUSR1, all_threads=True)


def end_with_parent(on_line: Callable[[str], None] | None = None) -> None:
    """Watch stdin, once the orders were read: it ends when the parent does, however it did.

    `on_line` gets, from a thread, what the parent writes meanwhile.
    """
    threading.Thread(target=_wait_for_end, args=(on_line,), name="parent-watch", daemon=True).start()


def run_reporting(run: Callable[[], None], tell: Callable[[Failure], None], name: str) -> int:
    """Run to the end and return the exit code; whatever ends it otherwise is told to the parent, who shows it last."""
    try:
        run()
    except RedlineError as error:
        tell(Failure.of(error))
        return error.exit_code
    except BaseException as error:
        logging.getLogger("redline").exception("%s failed", name)
        tell(Failure("EngineDeadError", f"{name} failed: {cause_of(error)}"))
        return 1
    return 0


def settle() -> None:
    """What was made while starting lives for ever: keep it out of every later collection, give back what it took."""
    import ctypes
    import gc

    gc.collect()
    gc.freeze()
    # The threads that read weights leave some hundred MB in glibc's pools, which keep them unless asked.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _ignore(_number: int, _frame: FrameType | None) -> None:
    pass


def _wait_for_end(on_line: Callable[[str], None] | None) -> None:
    begun = b""
    while data := os.read(sys.stdin.fileno(), 4096):  # not through sys.stdin: its lock would be held at exit
        *lines, begun = (begun + data).split(b"\n")
        for line in lines:
            if on_line is not None:
                on_line(line.decode())
    os.kill(os.getpid(), signal.SIGKILL)


# ----------------------------------------------------------------------------------------------------------- frames


def framed(message: Any) -> bytes:
    data = msgspec.msgpack.encode(message)
    return len(data).to_bytes(8, "little") + data


def read_framed(stream: BinaryIO, decoder: "msgspec.msgpack.Decoder[Any]") -> Any:
    """The next message; None once the other end has closed."""
    try:
        head = stream.read(8)
        return decoder.decode(stream.read(int.from_bytes(head, "little"))) if len(head) == 8 else None
    except ValueError:  # the stream was closed here while it was waited for
        return None
