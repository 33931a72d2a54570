"""A process that asks a server for /health ten times a second and reads the memory of its processes meanwhile."""

import http.client
import multiprocessing
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.perf.child_processes import end_with_parent

PERIOD_S = 0.1
READ_EVERY = 5  # requests between two readings of the memory
LIMIT_S = 60.0  # for one answer
PAGE = 4096


@dataclass(slots=True)
class Seen:
    """What was seen in one phase; memory in bytes of resident pages."""

    health_s: list[float] = field(default_factory=list)  # of each answer
    failures: list[str] = field(default_factory=list)
    front: list[int] = field(default_factory=list)  # of the API process
    core: list[int] = field(default_factory=list)  # of its children together
    queued_ns: list[int] = field(default_factory=list)  # that the server's event loop waited for a core
    own_queued_ns: list[int] = field(default_factory=list)  # that this process did

    def add(self, seconds: float) -> None:
        """Add an answer. A long one also counts for each request that would have been sent while it was awaited."""
        while seconds > 0:
            self.health_s.append(seconds)
            seconds -= PERIOD_S


class Watch:
    """As a context it runs the process; `take` returns what it saw since the last call.

    Args:
        host, port: of the server.
        pid: of its first process.
    """

    def __init__(self, host: str, port: int, pid: int):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_watch, args=(theirs, host, port, pid), daemon=True)

    def __enter__(self) -> Self:
        self._process.start()
        assert self._pipe.poll(LIMIT_S), "the watching process doesn't start"
        self._pipe.recv()
        return self

    def take(self) -> Seen:
        self._pipe.send(None)
        assert self._pipe.poll(2 * LIMIT_S), "the watching process doesn't answer"
        seen: Seen = self._pipe.recv()
        return seen

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.join()


def _watch(pipe: Connection, host: str, port: int, pid: int) -> None:
    end_with_parent()
    pipe.send(None)
    seen, count, due = Seen(), 0, time.monotonic()
    connection = http.client.HTTPConnection(host, port, timeout=LIMIT_S)
    while True:
        time.sleep(max(0.0, due - time.monotonic()))
        asked = time.monotonic()
        try:
            connection.request("GET", "/health")
            answer = connection.getresponse()
            answer.read()
            seen.add(time.monotonic() - asked)
            if answer.status != 200:
                seen.failures.append(f"/health answered {answer.status}")
        except (OSError, http.client.HTTPException) as error:
            seen.failures.append(f"/health: {error!r}")
            connection.close()
        due += PERIOD_S * (1 + max(0.0, time.monotonic() - due) // PERIOD_S)
        if count % READ_EVERY == 0:
            _read(seen, pid)
        count += 1
        if pipe.poll():
            pipe.recv()
            pipe.send(seen)
            seen = Seen()


def _read(seen: Seen, pid: int) -> None:
    """The resident pages. A process that ends meanwhile is left out."""
    with suppress(psutil.NoSuchProcess):
        server = psutil.Process(pid)
        seen.front.append(_resident(pid))
        seen.queued_ns.append(_queued_ns(pid))
        seen.own_queued_ns.append(_queued_ns(os.getpid()))
        seen.core.append(sum(_resident(child.pid) for child in server.children(recursive=True)))


def _resident(pid: int) -> int:
    with suppress(FileNotFoundError, ProcessLookupError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    return 0


def _queued_ns(pid: int) -> int:
    """The time that the first thread of a process waited for a core, since its start; 0 if that is not known."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[1])
    return 0
