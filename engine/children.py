"""Child processes: one protocol for the EngineCore, the API processes and the ranks.

    parent ──options on stdin, then lines──► child
    parent ◄──Loading, Up, Note, Failure──── child   (frames on a pipe; ranks send them over their socket)

A child's stdin stays open as long as its parent lives, so a child whose parent is gone ends too, even a stopped one.
Children are plain processes instead of `multiprocessing` ones, so that a user's script needs no `__main__` guard.
"""

import contextlib
import faulthandler
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol, TypeAlias, TypeVar

import msgspec

import engine.errors
from engine.errors import EngineDeadError, RedlineError, cause_of

Options = TypeVar("Options", bound=msgspec.Struct)


class Loading(msgspec.Struct, tag="loading"):
    """Bytes of weights read so far, and in total."""

    done: int
    total: int


class Up(msgspec.Struct, tag="up"):
    """The child is ready. `body` is its own report, encoded."""

    body: msgspec.Raw = msgspec.Raw(b"\xc0")

    @classmethod
    def of(cls, body: Any) -> "Up":
        return cls(msgspec.Raw(msgspec.msgpack.encode(body)))

    def read(self, kind: type[Any]) -> Any:
        return msgspec.msgpack.decode(self.body, type=kind)


class Failure(msgspec.Struct, tag="failure"):
    """The error that ends a child; `kind` is its class."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        return cls(type(error).__name__, str(error))

    def error(self) -> RedlineError:
        kind = getattr(engine.errors, self.kind, EngineDeadError)
        result: RedlineError = kind(self.message)
        return result


class Note(msgspec.Struct, tag="note"):
    """What a child says to its parent while it runs, encoded."""

    body: msgspec.Raw

    @classmethod
    def of(cls, body: Any) -> "Note":
        return cls(msgspec.Raw(msgspec.msgpack.encode(body)))

    def read(self, kind: Any) -> Any:
        return msgspec.msgpack.decode(self.body, type=kind)


Report: TypeAlias = Loading | Up | Note | Failure
Send: TypeAlias = Callable[[Report], None]

encode_report = msgspec.msgpack.Encoder().encode
decode_report = msgspec.msgpack.Decoder(Report).decode

# ----------------------------------------------------------------------------------------------------- in the parent


class ChildProcess:
    """A child as its parent sees it.

    Args:
        module: run by `python -m`, with `options` on stdin.
        name: for messages; the process id is added.
        inherit: file descriptors that the child keeps.
        memory_advice: what to do if the system killed the child for lack of memory.
        environment: variables that the child has besides those of this process.
    """

    def __init__(
        self,
        module: str,
        options: msgspec.Struct,
        *,
        name: str,
        inherit: Sequence[int] = (),
        memory_advice: str,
        environment: Mapping[str, str] | None = None,
    ):
        self._child = spawn(module, options, inherit, environment)
        self._memory_advice = memory_advice
        self.pid = self._child.pid
        self.name = f"{name} (process {self.pid})"

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._child.poll()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for its end; False if it still runs after the timeout."""
        try:
            self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def state(self) -> str:
        return process_state(self.pid)

    def dump_stacks(self) -> None:
        """Have it write the stacks of its threads to stderr (see `leave_signals_to_parent`)."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)

    def kill(self) -> None:
        """End it by force, if it still runs; `wait` afterwards."""
        self._child.kill()

    def send_line(self, line: str) -> None:
        """Write a line to its stdin; nothing happens if it has ended."""
        stdin = self._child.stdin
        assert stdin is not None
        with contextlib.suppress(OSError, ValueError):
            stdin.write(line.encode() + b"\n")
            stdin.flush()

    def error(self, failure: Failure | None, *, named: bool = True) -> RedlineError:
        """The error of a child that has ended: its own report (with the child's name if `named`), or its exit code."""
        if failure is None:
            return EngineDeadError(f"{self.name} {self._exit()}")
        error = failure.error()
        return type(error)(f"{self.name}: {error}") if named else error

    def close(self) -> None:
        """Close its stdin, which ends it if it still runs."""
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):  # lines that it did not read
            self._child.stdin.close()

    def _exit(self) -> str:
        code = self.returncode
        if code is None or code >= 0:
            return f"ended with exit code {code}"
        name = signal.Signals(-code).name
        hint = f"; if the system ran out of memory, {self._memory_advice}" if -code == signal.SIGKILL else ""
        return f"was killed by {name}{hint}"


class RankHandle(Protocol):
    """A rank in another process, as the EngineCore's process sees it; a ChildProcess is one."""

    pid: int

    @property
    def state(self) -> str:
        """The state of its process, a letter as of `process_state`."""
        ...

    def dump_stacks(self) -> None:
        """Have it write the stacks of its threads to stderr."""
        ...

    def kill(self) -> None:
        """End it by force, without waiting for its end."""
        ...


class PipeOptions(msgspec.Struct, kw_only=True):
    """Options of a child that reports on a pipe."""

    report_fd: int = -1  # set by ReportingChild


class ReportingChild(ChildProcess):
    """A child that reports on a pipe."""

    def __init__(
        self, module: str, options: PipeOptions, *, name: str, inherit: Sequence[int] = (), memory_advice: str
    ):
        reports, options.report_fd = os.pipe()
        self._reports = os.fdopen(reports, "rb", buffering=0)
        try:
            super().__init__(
                module, options, name=name, inherit=(*inherit, options.report_fd), memory_advice=memory_advice
            )
        finally:
            os.close(options.report_fd)

    def next_report(self) -> Report | None:
        """Block until the next report; None once the child has closed its end."""
        data = read_frame(self._reports)
        return None if data is None else decode_report(data)

    def close(self) -> None:
        super().close()
        self._reports.close()


def spawn(
    module: str,
    options: msgspec.Struct,
    inherit: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
) -> "subprocess.Popen[bytes]":
    """Start `python -m module` with its options on stdin, which stays open."""
    variables = None if environment is None else os.environ | environment
    child = subprocess.Popen(
        [sys.executable, "-m", module], stdin=subprocess.PIPE, pass_fds=tuple(inherit), env=variables
    )
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended: waiting for its report gives the cause
        child.stdin.write(frame(msgspec.msgpack.encode(options)))
        child.stdin.flush()
    return child


def process_state(pid: int) -> str:
    """The kernel's letter for the state of a process, e.g. R, S, T; empty if it can't be read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


# ------------------------------------------------------------------------------------------------------ in the child


def read_options(kind: type[Options]) -> Options | None:
    """Read the options from stdin, and leave signals to the parent. None if the parent is gone."""
    leave_signals_to_parent()
    _go_on_without_parent()
    with os.fdopen(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as stdin:
        data = read_frame(stdin)
    return None if data is None else msgspec.msgpack.decode(data, type=kind)


@contextlib.contextmanager
def reports_to(descriptor: int) -> Iterator[Send]:
    """A function that sends reports to the parent's pipe. Nothing happens if the parent is gone."""

    def send(report: Report) -> None:
        data = frame(encode_report(report))
        with contextlib.suppress(BrokenPipeError):
            while data:
                data = data[os.write(descriptor, data) :]

    try:
        yield send
    finally:
        os.close(descriptor)


def end_with_parent(on_line: Callable[[str], None] | None = None) -> None:
    """Watch stdin and end this process as soon as the parent has ended. `on_line` is called from a thread per line."""
    threading.Thread(target=_wait_for_end, args=(on_line,), name="parent-watch", daemon=True).start()


def run_reporting(
    run: Callable[[], None], send: Send, name: str = "", *, expected: tuple[type[Exception], ...] = ()
) -> int:
    """Run to the end and return the exit code. An error is reported to the parent, which prints it last.

    Args:
        name: the process, in the message of an error that is neither a RedlineError nor expected.
        expected: classes of errors that are reported without a traceback.
    """
    known: tuple[type[Exception], ...] = (RedlineError, *expected)
    try:
        run()
    except known as error:
        send(Failure.of(error))
        return error.exit_code if isinstance(error, RedlineError) else 1
    except BaseException as error:
        logging.getLogger("redline").exception("%s failed", name or "the process")
        send(Failure("EngineDeadError", f"{name} failed: {cause_of(error)}" if name else cause_of(error)))
        return 1
    return 0


def end_process(code: int) -> NoReturn:
    """End this process. After a failure at once: a thread that is still within a collective or a call of the device
    would make the end of the interpreter wait, or crash it, which hides the exit code.
    """
    if code:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit()


def freeze_heap() -> None:
    """Exclude all objects made so far from garbage collection, and return memory that starting up has freed."""
    import gc

    from engine.heap import trim_heap

    gc.collect()
    gc.freeze()
    trim_heap()  # the threads that read weights leave some hundred MB in glibc's pools


def leave_signals_to_parent() -> None:
    """A Ctrl-C reaches the whole process group; the parent decides when its children end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _ignore)
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # dumps stacks, also of threads that don't return to Python


def _go_on_without_parent() -> None:
    """Have Linux continue this process once the other end of stdin closes: a stopped process can't notice that.

    The signal also comes with each line that the parent writes. PR_SET_PDEATHSIG is no alternative: it comes when the
    thread that started this process ends, and `LLM` may be made in a thread of a user's program.
    """
    if sys.platform != "linux":
        return
    stdin = sys.stdin.fileno()
    fcntl.fcntl(stdin, fcntl.F_SETSIG, signal.SIGCONT)
    fcntl.fcntl(stdin, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(stdin, fcntl.F_SETFL, fcntl.fcntl(stdin, fcntl.F_GETFL) | os.O_ASYNC)


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


def frame(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data


def read_frame(stream: FileIO) -> bytes | None:
    """The next frame of an unbuffered stream; None once the other end has closed."""
    try:
        head = _read_exactly(stream, 8)
        return None if head is None else _read_exactly(stream, int.from_bytes(head, "little"))
    except ValueError:  # the stream was closed here in the meantime
        return None


def _read_exactly(stream: FileIO, length: int) -> bytes | None:
    parts = b""
    while len(parts) < length:
        part = stream.read(length - len(parts))
        if not part:
            return None
        parts += part
    return parts
