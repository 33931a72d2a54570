"""Starts child processes by forking a process that has imported torch and transformers already.

A rank or a core takes about seven seconds of CPU time to start, nearly all of it for imports. Tests that start them
from their own process replace `engine.children.spawn` by `ForkServer.spawn`; the code that runs in the child is the
same. Tests of `redline serve` and of scripts start them as users do.
"""

import atexit
import fcntl
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import msgspec

from engine.children import frame

PRELOAD = (
    "engine.launch",
    "engine.core.server",
    "engine.worker.rank",
    "engine.worker.runner",
    "engine.worker.backend_builder",
    "engine.worker.driver_broadcast",
    "transformers.models.llama.modeling_llama",
)
START_S = 60.0


class ForkedChild:
    """The part of subprocess.Popen that `engine.children` uses."""

    def __init__(self, server: "ForkServer", pid: int, stdin: int):
        self._server = server
        self.pid = pid
        self.stdin = os.fdopen(stdin, "wb")

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._server.exits.get(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        with self._server.changed:
            if not self._server.changed.wait_for(lambda: self.pid in self._server.exits, timeout):
                raise subprocess.TimeoutExpired("a forked child", timeout or 0.0)
        return self._server.exits[self.pid]

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class ForkServer:
    """The parent's side. Its process starts with the first child, and ends with `close`."""

    def __init__(self) -> None:
        self.exits: dict[int, int] = {}  # return codes by process id
        self.changed = threading.Condition()
        self._started: list[int] = []
        self._lock = threading.Lock()
        self._channel: socket.socket | None = None

    def spawn(
        self,
        module: str,
        options: msgspec.Struct,
        inherit: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> ForkedChild:
        stdin, ours = os.pipe()
        with self._lock:
            channel = self._channel = self._channel or self._start()
            request = json.dumps(
                {"module": module, "numbers": [0, *inherit], "environment": dict(environment or {})}
            ).encode()
            socket.send_fds(channel, [request], [stdin, *inherit])
            with self.changed:
                assert self.changed.wait_for(lambda: self._started, START_S), "the fork server does not answer"
                child = ForkedChild(self, self._started.pop(), ours)
        os.close(stdin)
        child.stdin.write(frame(msgspec.msgpack.encode(options)))
        child.stdin.flush()
        return child

    def close(self) -> None:
        if self._channel is not None:
            self._channel.shutdown(socket.SHUT_RDWR)
            self._process.wait()

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "tests.engine.fork_server", str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        threading.Thread(target=self._read, args=(ours,), name="fork-server", daemon=True).start()
        return ours

    def _read(self, channel: socket.socket) -> None:
        while data := channel.recv(1024):
            message = json.loads(data)
            with self.changed:
                if "status" in message:
                    self.exits[message["pid"]] = os.waitstatus_to_exitcode(message["status"])
                else:
                    self._started.append(message["pid"])
                self.changed.notify_all()


# ------------------------------------------------------------------------------------------------------ in the server


def serve(channel: socket.socket) -> None:
    """Fork a child for each request, and report their ends, until the other end closes."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is woken:
                    os.read(woken, 4096)
                    report_exits(channel)
                    continue
                data, descriptors, _, _ = socket.recv_fds(channel, 4096, 16)
                if not data:
                    return
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    channel.close()
                    run(**json.loads(data), descriptors=descriptors)
                for descriptor in descriptors:
                    os.close(descriptor)
                channel.send(json.dumps({"pid": pid}).encode())


def report_exits(channel: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        channel.send(json.dumps({"pid": pid, "status": status}).encode())


def run(module: str, numbers: list[int], descriptors: list[int], environment: dict[str, str]) -> NoReturn:
    """In the child: `python -m module`, with the descriptors under their numbers in the parent."""
    code: Any = 1
    try:
        lowest = max(*numbers, *descriptors) + 1
        copies = [duplicate(descriptor, lowest) for descriptor in descriptors]
        for number, copy in zip(numbers, copies, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        sys.argv = [module]
        os.environ |= environment
        code = importlib.import_module(module).main()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def duplicate(descriptor: int, lowest: int) -> int:
    """A copy of a descriptor, with a number of `lowest` or above."""
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, lowest)


def main() -> None:
    from engine.worker.threads import limit_libraries

    limit_libraries()
    for module in PRELOAD:
        importlib.import_module(module)
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
