"""Bodies of 40 MB, and a process that sends them one after the other."""

import http.client
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from tests.perf.child_processes import end_with_parent

MEGABYTES = 40
SIZE = MEGABYTES * 1_000_000
TIMES, APART_S = 5, 1.0  # a body is sent so often, at such distances
WORDS = "the quick brown fox jumps over the lazy dog and goes on to the next page of the book. "
PIECE = 1 << 16
LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Body:
    """A kind of body. taken: whether it is sent to a server that takes bodies of this size."""

    path: str
    make: Callable[[], Any]
    taken: bool
    chunked: bool = False  # without a content-length, so that its size isn't known before


def _text() -> str:
    return (WORDS * (SIZE // len(WORDS) + 1))[:SIZE]


def _completion() -> Any:
    return {"prompt": _text(), "max_tokens": 1}


BODIES = {
    "refused by its length": Body("/v1/completions", _completion, taken=False),
    "in chunks": Body("/v1/completions", _completion, taken=False, chunked=True),
    "text": Body("/v1/completions", _completion, taken=True),
    "text in chunks": Body("/v1/completions", _completion, taken=True, chunked=True),
    "chat": Body(
        "/v1/chat/completions",
        lambda: {"messages": [{"role": "user", "content": _text()}], "max_tokens": 1},
        taken=True,
    ),
    "token ids": Body("/v1/completions", lambda: {"prompt": [7] * (SIZE // 2), "max_tokens": 1}, taken=True),
    "empty lists": Body("/v1/completions", lambda: {"prompt": [[]] * (SIZE // 3), "max_tokens": 1}, taken=True),
    "texts to tokenize": Body("/tokenize", lambda: {"prompt": _text()}, taken=True),
}


class Sender:
    """As a context it runs the process; `answers` waits for its end.

    Args:
        url: of the server.
        name: of BODIES.
    """

    def __init__(self, url: str, name: str):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_send_all, args=(theirs, url, name), daemon=True)

    def __enter__(self) -> Self:
        self._process.start()
        return self

    def is_over(self) -> bool:
        return self._pipe.poll()

    def answers(self) -> list[tuple[int, float]]:
        """The status of each body, and the seconds until its answer."""
        assert self._pipe.poll(TIMES * LIMIT_S), "the bodies take too long"
        found: list[tuple[int, float]] = self._pipe.recv()
        return found

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.join()


def _send_all(pipe: Connection, url: str, name: str) -> None:
    end_with_parent()
    body = BODIES[name]
    data = json.dumps(body.make(), separators=(",", ":")).encode()
    answers = []
    for _ in range(TIMES):
        time.sleep(APART_S)
        answers.append(_send(url, body, data))
    pipe.send(answers)


def _send(url: str, body: Body, data: bytes) -> tuple[int, float]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=LIMIT_S)
    connection.putrequest("POST", body.path)
    connection.putheader("Content-Type", "application/json")
    connection.putheader(*(("Transfer-Encoding", "chunked") if body.chunked else ("Content-Length", str(len(data)))))
    connection.endheaders()
    began = time.monotonic()
    try:
        for piece in _pieces(body, data):
            connection.send(piece)
    except OSError:
        pass  # refused before all of it was sent: the answer is there already
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, round(time.monotonic() - began, 3)


def _pieces(body: Body, data: bytes) -> Iterator[bytes]:
    if not body.chunked:
        yield data
        return
    for at in range(0, len(data), PIECE):
        piece = data[at : at + PIECE]
        yield b"%x\r\n%b\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"
