"""Starts a server for a run, waits until it is healthy, and stops it with all its processes."""

import contextlib
import os
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from bench.child_processes import GroupEnd, before_exec
from bench.errors import BenchError

_GRACE_S = (20.0, 5.0, 5.0)  # after SIGINT, SIGTERM, SIGKILL
_EXIT_WAIT_S = 5.0


class ServerProcess:
    """A server in a process group of its own, with its output in a log file.

    `command` is an argument list or a command line; "{port}" in it, or in `url`, is replaced by a free port. Raises
    Raises BenchError with the end of the log if the server is not healthy within `start_limit_s`.
    """

    def __init__(
        self,
        command: Sequence[str] | str,
        log: Path | str,
        *,
        url: str = "http://127.0.0.1:{port}",
        health: str = "/health",
        start_limit_s: float = 900.0,
        verify: ssl.SSLContext | bool = True,
        headers: Mapping[str, str] | None = None,
    ):
        parts = shlex.split(command) if isinstance(command, str) else list(command)
        port = str(free_port())
        self.command = [part.replace("{port}", port) for part in parts]
        self.base_url = url.replace("{port}", port)
        self.log = Path(log)
        self._health = health if "://" in health else self.base_url + "/" + health.lstrip("/")
        self._health = self._health.replace("{port}", port)
        self._start_limit_s = start_limit_s
        self._verify = verify  # of health requests, as _headers
        self._headers = dict(headers or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._group_end: GroupEnd | None = None  # a server that is stopped does not get the death signal

    @classmethod
    def redline(
        cls, model: str, flags: Sequence[str], log: Path | str, *, start_limit_s: float = 900.0
    ) -> "ServerProcess":
        """`redline serve MODEL` with `flags`; host and port are chosen here unless they are among them."""
        host = _flag(flags, "--host")
        port = _flag(flags, "--port")
        command = [sys.executable, "-m", "cli.main", "serve", model, *flags]
        if host is None:
            command += ["--host", "127.0.0.1"]
        if port is None:
            command += ["--port", "{port}"]
        reach = "127.0.0.1" if host in (None, "0.0.0.0", "::") else host
        scheme = "https" if has_flag(flags, "--ssl-certfile") else "http"
        shown = f"[{reach}]" if ":" in str(reach) else reach
        url = f"{scheme}://{shown}:{port or '{port}'}"
        return cls(command, log, url=url, start_limit_s=start_limit_s, verify=scheme == "http")

    def __enter__(self) -> "ServerProcess":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until GET /health responds with 200."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as out:
            try:
                self._process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=before_exec(signal.SIGTERM),  # it ends its own processes
                )
            except OSError as error:
                raise BenchError(f"cannot start {self.command[0]!r}: {error.strerror or error}") from None
        self._group_end = GroupEnd(self._process.pid, signal.SIGCONT)
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        began = time.monotonic()
        with httpx.Client(timeout=5.0, trust_env=False, verify=self._verify, headers=self._headers) as client:
            while True:
                if not self.alive():
                    raise BenchError(f"the server did not start: {self.cause()}")
                with contextlib.suppress(httpx.HTTPError):
                    if client.get(self._health).status_code == 200:
                        return
                waited = time.monotonic() - began
                if waited > self._start_limit_s:
                    raise BenchError(
                        f"the server did not answer {self._health} within {waited:.0f} s; its last line: "
                        f"{self._last_line()} (log: {self.log})"
                    )
                time.sleep(0.2)

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def ends(self) -> bool:
        """Whether the server exits within some seconds, after it stopped responding."""
        assert self._process is not None
        try:
            self._process.wait(_EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            return False
        return True

    def cause(self) -> str:
        """Why the server is gone, in one line: the last line of its log and its exit code."""
        code = self._process.poll() if self._process is not None else None
        how = "" if code is None else f" (exit code {code})" if code >= 0 else f" (ended by signal {-code})"
        return f"{self._last_line()}{how}; log: {self.log}"

    def _last_line(self) -> str:
        """The last line of the server's log that is not empty."""
        text = ""
        if self.log.exists():
            with self.log.open("rb") as f:
                f.seek(0, os.SEEK_END)
                f.seek(max(0, f.tell() - 16384))
                text = f.read().decode("utf-8", "replace").strip()
        return text.splitlines()[-1].strip() if text else "it printed nothing"

    def stop(self) -> None:
        """Send SIGINT, SIGTERM and SIGKILL in turn; returns when the whole process group is gone."""
        process = self._process
        if process is None:
            return
        try:
            for number, grace in zip((signal.SIGINT, signal.SIGTERM, signal.SIGKILL), _GRACE_S, strict=True):
                if process.poll() is None:
                    self._signal(number)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(grace)
        finally:
            # Also after a second Ctrl-C, and for child processes that outlived the server.
            self._signal(signal.SIGKILL)
            process.wait()
            if self._group_end is not None:
                self._group_end.close()
                self._group_end = None

    def _signal(self, number: int) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


class RunningServer:
    """A server that was not started by this run: same interface as ServerProcess, but neither starts nor stops it."""

    def __init__(self, base_url: str):
        self.base_url = base_url

    def __enter__(self) -> "RunningServer":
        return self

    def __exit__(self, *_: object) -> None:
        """The server keeps running."""

    def ends(self) -> bool:
        return False

    def cause(self) -> str:
        return f"the server at {self.base_url} was not started by this run"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _flag(flags: Sequence[str], name: str) -> str | None:
    """The value of a flag, given as "--flag value" or "--flag=value"; underscores equal hyphens."""
    for i, flag in enumerate(flags):
        key, equals, value = flag.partition("=")
        if key.replace("_", "-") == name:
            return value if equals else (flags[i + 1] if i + 1 < len(flags) else None)
    return None


def has_flag(flags: Sequence[str], name: str) -> bool:
    return any(flag.partition("=")[0].replace("_", "-") == name for flag in flags)


def serve_flags(options: dict[str, object]) -> list[str]:
    """Flags of `redline serve` from plain data: {"enable-prefix-caching": False} -> ["--no-enable-prefix-caching"].

    The values of a list are joined by commas; None omits the flag.
    """
    flags: list[str] = []
    for name, value in options.items():
        hyphened = name.replace("_", "-").removeprefix("--")
        if isinstance(value, bool):
            flags.append(f"--{hyphened}" if value else f"--no-{hyphened}")
        elif isinstance(value, list):
            flags += [f"--{hyphened}", ",".join(str(word) for word in value)]
        elif value is not None:
            flags += [f"--{hyphened}", str(value)]
    return flags
