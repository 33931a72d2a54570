"""Answers that HTTP and server-sent events allow, over real sockets: each is read as it is, and costs no waiting."""

import gzip
import json
import time
import zlib
from typing import Any

import pytest

from bench.loadgen import Recording, Target, run_closed_loop
from bench.workloads import RequestSpec
from tests.bench.loadgen.raw_server import Piece, RawServer
from tests.bench.loadgen.scripted import Quiet, answered

EVER = (-1.0, float("inf"))
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
PAUSE_S = 0.1


def event(message: Any, end: bytes = b"\n") -> bytes:
    return b"data: " + json.dumps(message).encode() + end + end


def text(words: str | None, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": words, "finish_reason": finish}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 3}}
DONE = b"data: [DONE]\n\n"
EVENTS = [event(text("a")), event(text("b")), event(text("c", "length")), event(USAGE), DONE]
BODY = b"".join(EVENTS)
GZIPPED = gzip.compress(BODY, mtime=0)
DEFLATED_HEAD = HEAD + b"Content-Encoding: deflate\r\nTransfer-Encoding: chunked\r\n\r\n"
EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%s\r\n%s\r\n" % (len(data), extension, data)


CHUNKS = b"".join(map(chunk, EVENTS))
CRLF_CHUNKS = b"".join(chunk(one.replace(b"\n", b"\r\n")) for one in EVENTS)


def send(server: RawServer, count: int, tokens: int = 3) -> tuple[Recording, float]:
    """One request after the other, and the seconds all took from time 0 on."""
    specs = [RequestSpec(2, tokens, prompt_ids=[1, 2]) for _ in range(count)]
    began = time.monotonic()
    recording = run_closed_loop(Target(server.url, "m"), specs, 1, observer=Quiet(), time_limit_s=30)
    return recording, time.monotonic() - began


@pytest.mark.parametrize(
    "answer",
    [
        [CHUNKED + CHUNKS + b"0\r\n\r\n"],
        [CHUNKED + CHUNKS + b"0\r\nX-Checksum: 12\r\nServer-Timing: total;dur=9\r\n\r\n"],
        [CHUNKED + CHUNKS, b"0\r\nX-Checksum: 12\r\n", b"\r\n"],
        [CHUNKED + CHUNKS + b"0;last\r\n\r\n"],
        [CHUNKED + b"".join(chunk(one, b';n="1"') for one in EVENTS) + b"000000;e=1\r\n\r\n"],
        [CHUNKED + CRLF_CHUNKS + b"0\r\n\r\n"],
        [b"HTTP/1.1 100 Continue\r\n\r\n", 0.01, EARLY_HINTS + CHUNKED + CHUNKS, b"0\r\n\r\n"],
        [HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY],
        [HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(GZIPPED) + GZIPPED],
        [DEFLATED_HEAD + chunk(zlib.compress(BODY)) + b"0\r\n\r\n"],
        [HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunk(GZIPPED) + b"0\r\n\r\n"],
    ],
    ids=[
        "plain", "trailers", "late trailers", "extension of the last chunk", "extensions", "CRLF events", "interim",
        "length", "gzip", "deflate", "gzip as transfer coding",
    ],
)  # fmt: skip
def test_answers_end_when_they_end(answer: list[Piece]) -> None:
    with RawServer(answer) as server:
        recording, seconds = send(server, 8)
    rows = recording.rows(EVER)
    assert [(r.status, r.error, r.chunk_tokens) for r in rows] == [("ok", "", [1, 1, 1])] * 8
    assert server.connections == 1
    assert seconds < 1.0  # a single wait for an end that isn't seen takes that long


@pytest.mark.parametrize("closes", [True, False])
def test_an_answer_that_lasts_until_the_connection_closes(closes: bool) -> None:
    """[DONE] ends it for whoever reads the stream, even where the server takes its time to close."""
    with RawServer([HEAD + b"\r\n" + BODY, *([] if closes else [2.0])], closes=True) as server:
        recording, seconds = send(server, 4)
    assert [(r.status, r.error, r.output_tokens) for r in recording.rows(EVER)] == [("ok", "", 3)] * 4
    assert server.connections == 4
    assert seconds < 1.0


@pytest.mark.parametrize("rest", [b"", b"0\r\n\r\nHTTP/1.1 408 Timeout\r\n\r\nx"])
def test_an_end_that_is_none_is_said(rest: bytes) -> None:
    with RawServer([CHUNKED + CHUNKS + rest]) as server:
        (row,) = send(server, 1)[0].rows(EVER)
    assert (row.status, row.output_tokens) == ("ok", 3)
    assert "does not end as HTTP asks" in row.error


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("opening", [event(text("")), event(text(None)), b": hello\n\n", b"event: ping\ndata: {}\n\n"])
def test_the_first_token_is_the_first_with_words(opening: bytes, packed: bool) -> None:
    events = [opening, PAUSE_S, *EVENTS]
    head = CHUNKED
    if packed:
        pack = zlib.compressobj(wbits=31)
        events = [
            one if isinstance(one, float) else pack.compress(one) + pack.flush(zlib.Z_SYNC_FLUSH) for one in events
        ]
        head = HEAD + b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = [head, *(one if isinstance(one, float) else chunk(one) for one in events), b"0\r\n\r\n"]
    with RawServer(answer) as server:
        (row,) = send(server, 1)[0].rows(EVER)
    assert (row.status, row.chunk_tokens, row.output_tokens) == ("ok", [1, 1, 1], 3)
    assert row.ttft_s is not None
    assert row.ttft_s >= PAUSE_S


def whole(status: str, content: bytes, *fields: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", *fields, f"Content-Length: {len(content)}", "", ""]
    return "\r\n".join(lines).encode() + content


FULL = gzip.compress(b'{"error": {"message": "full"}}', mtime=0)
HTML, JSON = "Content-Type: text/html", "Content-Type: application/json"
DIED = event({"error": {"message": "died"}})


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (whole("307 X", b"", "Location: https://h/v1/completions"), "http 307", "redirects to https://h/v1"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "http 204", ""),
        (whole("200 OK", b'{"error": "out of order"}', JSON), "no stream", "JSON instead of a stream: out of order"),
        (whole("200 OK", b"<html><title>Sign in</title>", HTML), "no stream", "a page instead of a stream: Sign in"),
        (whole("200 OK", b""), "no stream", "an empty body"),
        (CHUNKED + b"zz\r\nwhat\r\n\r\n", "malformed stream", "chunks are not framed"),
        (whole("200 OK", b"x", "Content-Encoding: br"), "malformed stream", "Content-Encoding 'br'"),
        (CHUNKED + chunk(EVENTS[0] + DIED + DONE) + b"0\r\n\r\n", "stream error", "died"),
        (whole("503 X", FULL, "Content-Encoding: gzip"), "http 503", "full"),
    ],
)
def test_what_is_no_stream_is_named(answer: bytes, status: str, words: str) -> None:
    with RawServer([answer]) as server:
        recording, seconds = send(server, 3)
    rows = recording.rows(EVER)
    assert [row.status for row in rows] == [status] * 3
    assert all(words in row.error for row in rows)
    assert seconds < 2.0


def test_a_request_that_is_refused_before_it_is_read_keeps_its_cause() -> None:
    """A server that answers and closes early resets the connection: its answer is there to read, and says why."""
    refusal = whole("413 X", b'{"error": {"message": "at most 1 MB"}}')
    for reads in ([refusal], [refusal[:30], refusal[30:]]):
        row, _, _ = answered(reads, takes=3)
        assert (row.status, row.error) == ("http 413", "at most 1 MB")
    for reads in ([], [refusal[:30]]):
        row, _, _ = answered(reads, takes=3)
        assert row.status == "connection"
    assert answered([b"SSH-2.0"], takes=3)[0].status == "malformed stream"
