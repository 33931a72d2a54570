"""HTTP framing: heads, ends of answers, and the place of every byte of a body."""

import gzip
import zlib
from bisect import bisect_right

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.loadgen import content_coding
from bench.loadgen.response import Body, Head, MalformedError, read_head

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def head_of(answer: bytes) -> Head:
    head = read_head(answer)
    assert head is not None
    return head


def test_heads() -> None:
    head = head_of(b"HTTP/1.1 429 Too Many\r\nContent-LENGTH:  12 \r\nX: y\r\n\r\n")
    assert (head.status, head.length, head.chunked) == (429, 12, False)
    assert head_of(CHUNKED).chunked
    assert head_of(b"HTTP/1.0 200 OK\r\n\r\n").length is None
    assert head_of(b"HTTP/1.1 200\r\n\r\n").status == 200


@given(st.integers(0, len(CHUNKED) - 1))
def test_a_head_in_pieces_is_awaited(cut: int) -> None:
    assert read_head(CHUNKED[:cut]) is None


@pytest.mark.parametrize(
    "answer",
    [b"SSH-2.0", b"HTTP/2 200\r\n\r\n", b"HTTP/1.1 x\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"],
)
def test_what_is_no_http(answer: bytes) -> None:
    with pytest.raises(MalformedError):
        read_head(answer)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=12))
def test_chunks_join_and_keep_their_places(pieces: list[bytes]) -> None:
    answer = CHUNKED + b"".join(b"%x;ext=1\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    head = head_of(answer)
    body = Body(answer, head)
    assert body.data == b"".join(pieces)
    assert body.malformed == ""
    assert all(answer[body.place(i)] == byte for i, byte in enumerate(body.data))
    assert head.ending().reached(bytearray(answer))


@given(st.integers(0, 60))
def test_a_cut_body_keeps_what_came(cut: int) -> None:
    answer = CHUNKED + b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
    body = Body(answer[: len(CHUNKED) + cut], head_of(CHUNKED))
    assert b"hello world".startswith(body.data)
    assert body.malformed == ""


def test_the_end_is_the_last_chunk_only() -> None:
    ending = head_of(CHUNKED).ending()
    answer = bytearray(CHUNKED + b"b\r\ndata: 0\r\n\r\n\r\n")
    assert not ending.reached(answer)
    answer += b"5\r\n0\r\n\r\n\r\n"
    assert not ending.reached(answer)
    answer += b"0\r\n\r\n"
    assert ending.reached(answer)
    assert ending.end == len(answer)
    assert not head_of(CHUNKED).ending().reached(bytearray(CHUNKED + b"9\r\ndata: 0\r\n\r\n"))
    assert head_of(CHUNKED).ending().reached(bytearray(CHUNKED + b"0\r\n\r\n"))


@pytest.mark.parametrize(
    "last",
    [
        b"0\r\n\r\n", b"000\r\n\r\n", b"0;ext\r\n\r\n", b'0 ; a="b;c"\r\n\r\n', b"0\r\nX-Sum: 1\r\n\r\n",
        b"0;e=1\r\nA: b\r\nC: d\r\n\r\n",
    ],
)  # fmt: skip
def test_the_end_of_a_chunked_answer_has_many_forms(last: bytes) -> None:
    answer = bytearray(CHUNKED + b"5;x=y\r\nhello\r\n")
    ending = head_of(CHUNKED).ending()
    for byte in last:
        assert not ending.reached(answer)
        answer.append(byte)
    assert ending.reached(answer)
    assert ending.end == len(answer)
    body = Body(bytes(answer), head_of(CHUNKED))
    assert (body.data, body.malformed) == (b"hello", "")


@pytest.mark.parametrize(
    "size", [b"", b" 5", b"+5", b"-5", b"0x5", b"5_0", b"5\n", b"g", b"5 5", b"f" * 40, b";x", b"5" * 20_000]
)
def test_sizes_that_are_none(size: bytes) -> None:
    answer = CHUNKED + size + b"\r\nhello\r\n\r\n"
    with pytest.raises(MalformedError):
        head_of(CHUNKED).ending().find(bytearray(answer))
    assert Body(answer, head_of(CHUNKED)).malformed == "the chunks of the response are not framed as HTTP requires"


def test_interim_answers_are_passed_over() -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n"
    assert read_head(interim) is None
    assert read_head(interim + CHUNKED[:9]) is None
    head = head_of(interim + CHUNKED)
    assert (head.status, head.chunked, head.body_start) == (200, True, len(interim + CHUNKED))
    assert head_of(b"HTTP/1.1 101 Switching Protocols\r\n\r\n").status == 101


def test_what_header_fields_say() -> None:
    def head(*fields: str, version: str = "1.1", status: int = 200) -> Head:
        return head_of("\r\n".join([f"HTTP/{version} {status} OK", *fields, "", ""]).encode())

    assert head("Content-Length: 5, 5").length == 5
    assert head("Content-Length: 5", "Content-Length: 5").length == 5
    both = head("Content-Length: 5", "Transfer-Encoding: chunked")
    assert (both.length, both.chunked, both.keeps) == (None, True, False)
    assert head("Transfer-Encoding: gzip, Chunked").codings == ("gzip",)
    assert not head("Transfer-Encoding: not-chunked").chunked
    assert head("Content-Encoding: identity").codings == ()
    assert head("Content-Encoding: deflate", "Content-Encoding: gzip").codings == ("deflate", "gzip")
    assert head("Content-Type: Text/HTML; charset=utf-8").media == "text/html"
    assert head("X: a", "\tb: c", "Content-Length: 2").length == 2  # a folded line
    assert [head("Content-Length: 1", f"Connection: {c}").keeps for c in ("close", "x, Close", "keep-alive")] == [
        False, False, True,
    ]  # fmt: skip
    assert not head("Content-Length: 1", version="1.0").keeps
    assert head("Content-Length: 1", "Connection: keep-alive", version="1.0").keeps
    assert (head("Transfer-Encoding: chunked", status=204).length, head(status=304).length) == (0, 0)
    assert head_of(b"\r\nHTTP/1.1 200 OK\nContent-Length: 3\n\n").length == 3
    for wrong in (["Content-Length: 5, 6"], ["Content-Length: -1"], ["Transfer-Encoding: chunked, gzip"], ["no colon"]):
        with pytest.raises(MalformedError):
            head(*wrong)


def test_broken_chunks_say_so_and_keep_what_came() -> None:
    body = Body(CHUNKED + b"2\r\nhi\r\nzz\r\n", head_of(CHUNKED))
    assert (body.data, body.malformed) == (b"hi", "the chunks of the response are not framed as HTTP requires")
    body = Body(CHUNKED + b"1\r\nhi\r\n", head_of(CHUNKED))
    assert body.malformed == "a chunk of the response is longer than its announced size"


def test_body_with_a_length() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello and more"
    body = Body(answer, head_of(answer))
    assert body.data == b"hello"
    assert answer[body.place(4) : body.place(4) + 1] == b"o"


EVENTS = [b"data: %d\n\n" % i for i in range(40)]


def _packed(kind: str) -> tuple[bytes, list[int]]:
    """All events, and how many bytes there are after each one, flushed as a server does."""
    if kind == "gzip members":
        parts = [gzip.compress(event) for event in EVENTS]
    else:
        pack = zlib.compressobj(wbits={"gzip": 31, "deflate": 15, "raw deflate": -15}[kind])
        parts = [pack.compress(event) + pack.flush(zlib.Z_SYNC_FLUSH) for event in EVENTS]
        parts[-1] += pack.flush()
    return b"".join(parts), np.cumsum([len(part) for part in parts]).tolist()


@pytest.mark.parametrize("kind", ["gzip", "deflate", "raw deflate", "gzip members"])
@pytest.mark.parametrize("chunked", [False, True])
def test_packed_bodies_keep_the_read_of_each_event(kind: str, chunked: bool) -> None:
    packed, ends = _packed(kind)
    start = b"HTTP/1.1 200 OK\r\nContent-Encoding: %s\r\n" % kind.split()[-1 if "raw" in kind else 0].encode()
    parts = [packed[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    if chunked:
        head = start + b"Transfer-Encoding: chunked\r\n\r\n"
        parts = [b"%x\r\n%s\r\n" % (len(part), part) for part in parts] + [b"0\r\n\r\n"]
    else:
        head = start + b"Content-Length: %d\r\n\r\n" % len(packed)
    reads = np.cumsum([len(head), *map(len, parts)]).tolist()
    body = Body(head + b"".join(parts), head_of(head), reads)
    assert (body.data, body.malformed) == (b"".join(EVENTS), "")
    for number, end in enumerate(np.cumsum([len(event) for event in EVENTS]).tolist()):
        assert bisect_right(reads, body.place(end - 1)) == 1 + number


def test_packed_bodies_that_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(name: str, data: bytes) -> Body:
        answer = b"HTTP/1.1 200 OK\r\nContent-Encoding: %s\r\n\r\n%s" % (name.encode(), data)
        return Body(answer, head_of(answer))

    assert body("gzip", b"data: 1\n\n").malformed == "the response has Content-Encoding gzip, but other bytes"
    assert "Content-Encoding 'br'" in body("br", b"x").malformed
    assert body("gzip", gzip.compress(b"hello")[:-9]).malformed == ""
    assert body("gzip, deflate", zlib.compress(gzip.compress(b"hello"))).data == b"hello"
    monkeypatch.setattr(content_coding, "MAX_BYTES", 1000)
    assert body("deflate", zlib.compress(bytes(1000))).malformed == ""
    bomb = zlib.compress(bytes(1001))
    assert "decompressed response exceeds" in body("deflate", bomb).malformed
