"""HTTP framing: heads, ends of answers, and the place of every byte of a body."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    assert head.complete(bytearray(answer))


@given(st.integers(0, 60))
def test_a_cut_body_keeps_what_came(cut: int) -> None:
    answer = CHUNKED + b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
    body = Body(answer[: len(CHUNKED) + cut], head_of(CHUNKED))
    assert b"hello world".startswith(body.data)
    assert body.malformed == ""


def test_the_end_is_the_last_chunk_only() -> None:
    head = head_of(CHUNKED)
    answer = bytearray(CHUNKED + b"c\r\ndata: 0\r\n\r\n\r\n")
    assert not head.complete(answer)
    assert not head.complete(bytearray(CHUNKED + b"a\r\ndata: 0\r\n\r\n"))
    assert head.complete(answer + b"0\r\n\r\n")
    assert head.complete(bytearray(CHUNKED + b"0\r\n\r\n"))


def test_broken_chunks_say_so_and_keep_what_came() -> None:
    body = Body(CHUNKED + b"2\r\nhi\r\nzz\r\n", head_of(CHUNKED))
    assert (body.data, body.malformed) == (b"hi", "the answer's chunks are not framed as HTTP asks")
    body = Body(CHUNKED + b"1\r\nhi\r\n", head_of(CHUNKED))
    assert body.malformed == "a chunk of the answer is longer than announced"


def test_body_with_a_length() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello and more"
    body = Body(answer, head_of(answer))
    assert body.data == b"hello"
    assert answer[body.place(4) : body.place(4) + 1] == b"o"
