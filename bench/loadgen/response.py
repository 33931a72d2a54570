"""HTTP/1.1 framing of an answer: its end, found in the loop; its body and where each byte of it lay, found later."""

import re
from bisect import bisect_right
from dataclasses import dataclass

_HEAD_END = b"\r\n\r\n"
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) (\d{3})(?: |\r\n)")
_MAX_HEAD_BYTES = 1 << 16


class MalformedError(Exception):
    """The bytes are no HTTP answer, or one whose framing is broken."""


@dataclass(frozen=True, slots=True)
class Head:
    """What the loop needs from the status line and the headers."""

    status: int
    body_start: int  # in bytes from the start of the answer
    length: int | None  # of the body, where the server says it
    chunked: bool
    keeps: bool = False  # the connection may carry another request after this answer

    def complete(self, answer: bytearray) -> bool:
        """Whether the whole body is there; an answer without length or chunks ends with the connection."""
        if self.chunked:
            # Neither JSON nor SSE holds a bare "0" between two CRLF, so the last bytes decide.
            return answer.endswith(_LAST_CHUNK)
        return self.length is not None and len(answer) >= self.body_start + self.length


def read_head(answer: bytearray | bytes) -> Head | None:
    """The head, or None while it is incomplete; raises MalformedError."""
    end = answer.find(_HEAD_END)
    if end < 0:
        if len(answer) > _MAX_HEAD_BYTES or not b"HTTP/1.".startswith(bytes(answer[:7])):
            raise MalformedError("the server did not answer in HTTP")
        return None
    head = bytes(answer[: end + 2])
    match = _STATUS_LINE.match(head)
    if match is None:
        raise MalformedError("the server did not answer in HTTP")
    fields: dict[bytes, bytes] = {}
    for line in head.split(b"\r\n")[1:-1]:
        name, _, value = line.partition(b":")
        fields[name.strip().lower()] = value.strip().lower()
    chunked = fields.get(b"transfer-encoding", b"").endswith(b"chunked")
    length = None
    if not chunked and b"content-length" in fields:
        if not fields[b"content-length"].isdigit():
            raise MalformedError("the answer's Content-Length is no number")
        length = int(fields[b"content-length"])
    keeps = match[1] == b"1" and b"close" not in fields.get(b"connection", b"") and (chunked or length is not None)
    return Head(int(match[2]), end + len(_HEAD_END), length, chunked, keeps)


class Body:
    """The body of an answer, and the place each of its bytes had in what was read from the socket.

    `malformed` says in words where the framing broke; `data` is then what came before.
    """

    def __init__(self, answer: bytes, head: Head):
        self.malformed = ""
        self._starts: list[int] = []  # of each piece, in the body
        self._places: list[int] = []  # of each piece, in the answer
        if head.chunked:
            self.data = self._join_chunks(answer, head.body_start)
        else:
            stop = len(answer) if head.length is None else head.body_start + head.length
            self.data = answer[head.body_start : stop]
            self._starts.append(0)
            self._places.append(head.body_start)

    def place(self, offset: int) -> int:
        """Where the body's byte at `offset` lay in the answer."""
        piece = bisect_right(self._starts, offset) - 1
        return self._places[piece] + offset - self._starts[piece]

    def _join_chunks(self, answer: bytes, at: int) -> bytes:
        pieces: list[bytes] = []
        total = 0
        while (line_end := answer.find(b"\r\n", at)) >= 0:
            try:
                size = int(answer[at:line_end].split(b";", 1)[0], 16)
            except ValueError:
                self.malformed = "the answer's chunks are not framed as HTTP asks"
                break
            if size == 0:
                break
            at = line_end + 2
            piece = answer[at : at + size]
            pieces.append(piece)
            self._starts.append(total)
            self._places.append(at)
            total += len(piece)
            at += size
            if answer[at : at + 2] not in (b"\r\n", b"\r", b""):
                self.malformed = "a chunk of the answer is longer than announced"
                break
            at += 2
        return b"".join(pieces)
