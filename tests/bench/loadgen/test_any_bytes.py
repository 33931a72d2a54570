"""Whatever bytes an answer consists of and however they are cut: the right row, or a failure in words."""

import gzip
import itertools
import json
import zlib
from typing import Any

import httptools
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from bench.loadgen.response import Body, read_head
from tests.bench.loadgen.scripted import answered

KINDS = {"ok", "connection", "malformed stream", "stream error", "no stream"}


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def sse(messages: list[str], end: str) -> bytes:
    return "".join(f"{message}{end}{end}" for message in messages).encode()


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, int]:
    """The body of an answer of a few tokens, with noise between its events; and how many tokens it has."""
    count = draw(st.integers(1, 4))
    noise = st.sampled_from([": ping", "event: ping", "data:", "data: {}", "event: x\ndata: y", "retry: 3", ""])
    messages = draw(st.lists(noise, max_size=2))
    for i in range(count):
        content = draw(st.text(st.characters(codec="utf-8"), min_size=1, max_size=5))
        choice = {"index": 0, "text": content, "finish_reason": "length" if i == count - 1 else None}
        messages += ["data: " + json.dumps({"choices": [choice]}, ensure_ascii=draw(st.booleans()))]
        messages += draw(st.lists(noise, max_size=1))
    messages += ["data: " + json.dumps({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": count}})]
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    return sse([m.replace("\n", end) for m in [*messages, "data: [DONE]"]], end), count


@st.composite
def answers(draw: st.DrawFn) -> tuple[bytes, bytes, int, bool]:
    """A whole HTTP answer, its body, the tokens in it, and whether its end shows without the end of the connection."""
    body, count = draw(streams())
    interim = draw(st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 X\r\nLink: </a>\r\n\r\n"]))
    head = interim + b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    coding = draw(st.sampled_from(["", "gzip", "deflate"]))
    packed = {"": bytes, "gzip": gzip.compress, "deflate": zlib.compress}[coding](body)
    head += b"Content-Encoding: %s\r\n" % coding.encode() if coding else b""
    framing = draw(st.sampled_from(["chunked", "length", "close"]))
    if framing == "length":
        return head + b"Content-Length: %d\r\n\r\n" % len(packed) + packed, body, count, True
    if framing == "close":
        return head + b"Connection: close\r\n\r\n" + packed, body, count, False
    extension = draw(st.sampled_from([b"", b";a", b';a="b;c"', b" ;x=1"]))
    frames = [
        b"%x%s\r\n%s\r\n" % (len(piece), extension, piece)
        for piece in cut(packed, draw(st.lists(st.integers(0, 1 << 16), max_size=5)))
    ]
    trailers = draw(st.sampled_from([b"", b"X-Sum: 1\r\n", b"A: b\r\nServer-Timing: x;dur=1\r\n"]))
    last = draw(st.sampled_from([b"0", b"00", b"0;end"])) + b"\r\n" + trailers + b"\r\n"
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(frames) + last, body, count, True


@settings(max_examples=60, deadline=None)
@given(answers(), st.lists(st.integers(0, 1 << 16), max_size=8), st.booleans())
def test_any_cut_into_reads_gives_the_same_row(
    answer: tuple[bytes, bytes, int, bool], places: list[int], bytewise: bool
) -> None:
    data, _, count, shows_end = answer
    row, connection, loop = answered([bytes([b]) for b in data] if bytewise else cut(data, places), count)
    assert (row.status, row.error, row.chunk_tokens, row.output_tokens) == ("ok", "", [1] * count, count)
    assert connection.left == 0 or not shows_end  # what shows no end may be over with [DONE] already
    assert not loop.streams[0].unended
    assert loop.counts.finished == 1


@settings(max_examples=40, deadline=None)
@given(answers())
def test_the_body_is_what_httptools_reads(answer: tuple[bytes, bytes, int, bool]) -> None:
    data, expected, _, _ = answer
    assume(b" ;x=1" not in data)  # blanks before an extension: bad, says RFC 9112, but to be read
    head = read_head(data)
    assert head is not None
    assert Body(data, head).data == expected

    class Reader:
        body, final = b"", False

        def on_headers_complete(self) -> None:
            self.final = parser.get_status_code() == 200

        def on_body(self, piece: bytes) -> None:
            self.body += piece

    reader: Any = Reader()
    parser = httptools.HttpResponseParser(reader)
    parser.feed_data(data)
    assert reader.final
    undo = {(): bytes, ("gzip",): gzip.decompress, ("deflate",): zlib.decompress}[head.codings]
    assert undo(reader.body) == expected


@settings(max_examples=120, deadline=None)
@given(answers(), st.data())
def test_damaged_answers_are_rows_too(answer: tuple[bytes, bytes, int, bool], data: st.DataObject) -> None:
    whole = bytearray(answer[0])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole)))
        whole[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    places = data.draw(st.lists(st.integers(0, 1 << 16), max_size=5))
    row, _, _ = answered(cut(bytes(whole), places), answer[2])
    assert row.status in KINDS or row.status.startswith("http ")
    assert row.status == "ok" or row.error or row.status.startswith("http ")
    assert len(row.chunk_gaps_s) == max(0, len(row.chunk_tokens) - 1)


@settings(max_examples=120, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["", "chunked", "gzip"]))
@example(b"", "")
@example(b"f" * 100_000, "chunked")
def test_garbage_is_a_failure_in_words(garbage: bytes, kind: str) -> None:
    head = {
        "": b"",
        "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        "gzip": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n",
    }[kind]
    row, _, _ = answered([head, garbage] if head else [garbage])
    assert row.status in KINDS - {"ok"}
    assert row.error
    assert row.output_tokens == 0
