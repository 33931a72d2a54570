"""HTTP/1.1 framing of a response (RFC 9112): its end, found in the loop; its body and the place of each byte, later.

The loop only needs the end of a response. For chunked ones that costs one comparison per read, since every chunked
message ends with an empty line. If a read ends with one that is not the usual end of a stream, the chunks are parsed.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.loadgen.content_coding import CodingError, Decoder, decoder

_HEAD_END = re.compile(rb"\r?\n\r?\n")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) (\d{3})(?:[ \t][^\r\n]*)?")
_FOLDED = re.compile(rb"\r?\n[ \t]+")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_EMPTY_LINE = b"\r\n\r\n"
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_SHORT_SIZES = {b"%x" % size: size for size in range(1 << 12)}  # avoids parsing the usual sizes
_MAX_HEAD_BYTES = 1 << 16
_MAX_LINE_BYTES = 1 << 14  # of a chunk's size with its extensions, or of a trailer
_NO_BODY = frozenset({101, 204, 304})
# At the start of a line: line ends in the JSON of an event are escaped, so generated text cannot match.
_DONE = re.compile(rb"(?:^|[\r\n])data: ?\[DONE\]")
_TAIL_BYTES = 64
BAD_CHUNKS = "the chunks of the response are not framed as HTTP requires"
LONG_CHUNK = "a chunk of the response is longer than its announced size"


class MalformedError(Exception):
    """The bytes are not an HTTP response, or its framing is broken."""


class Ending(Protocol):
    """Finds the end of a response; `end` is the offset after its last byte, once known."""

    end: int | None

    def reached(self, response: bytearray) -> bool:
        """Whether the response is complete; called after each read. Raises MalformedError."""
        ...

    def find(self, response: bytearray) -> bool:
        """The same without the shortcut of the hot path: also finds an end that other bytes follow."""
        ...


@dataclass(frozen=True, slots=True)
class Head:
    """The status and header fields of the final response that are needed here."""

    status: int
    body_start: int  # in bytes from the start of what was read, including interim responses
    length: int | None  # of the body, if the server sends it
    chunked: bool
    keeps: bool = False  # the connection may be reused after this response
    codings: tuple[str, ...] = ()  # gzip, …: in the order in which they were applied
    media: str = ""  # Content-Type without parameters
    location: str = ""

    def ending(self) -> Ending:
        """The object that finds the end of this response."""
        if self.chunked:
            return _ChunkedEnding(self.body_start)
        if self.length is not None:
            return _KnownEnding(self.body_start + self.length)
        return _CloseEnding()


def read_head(response: bytearray | bytes) -> Head | None:
    """The head of the final response, after any interim ones (1xx); None while it is incomplete.

    Raises MalformedError.
    """
    at = 0
    while True:
        while response[at : at + 1] in (b"\r", b"\n"):  # RFC 9112, 2.2: empty lines ahead are skipped
            at += 1
        end = _HEAD_END.search(response, at)
        if end is None:
            if len(response) - at > _MAX_HEAD_BYTES or not b"HTTP/1.".startswith(bytes(response[at : at + 7])):
                raise MalformedError("the server did not answer in HTTP")
            return None
        head = _parse_head(bytes(response[at : end.start()]), end.end())
        if not 100 <= head.status < 200 or head.status == 101:
            return head
        at = end.end()


def _parse_head(text: bytes, body_start: int) -> Head:
    lines = _FOLDED.sub(b" ", text).replace(b"\r\n", b"\n").split(b"\n")
    match = _STATUS_LINE.fullmatch(lines[0])
    if match is None:
        raise MalformedError("the server did not answer in HTTP")
    status = int(match[2])
    fields = _fields(lines[1:])
    transfer = _words(fields, b"transfer-encoding")
    chunked = bool(transfer) and transfer[-1] == "chunked"
    if "chunked" in transfer[:-1]:
        raise MalformedError("the Transfer-Encoding of the response is not allowed in HTTP")
    length = None if transfer else _content_length(fields)
    if status in _NO_BODY:
        chunked, length = False, 0
    connection = _words(fields, b"connection")
    persistent = "close" not in connection if match[1] == b"1" else "keep-alive" in connection
    ambiguous = bool(transfer) and b"content-length" in fields  # allowed, but the connection must not be reused
    codings = _words(fields, b"content-encoding") + [coding for coding in transfer if coding != "chunked"]
    return Head(
        status,
        body_start,
        length,
        chunked,
        keeps=persistent and not ambiguous and status != 101 and (chunked or length is not None),
        codings=tuple(coding for coding in codings if coding != "identity"),
        media=fields.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower(),
        location=fields.get(b"location", b"").decode("latin-1"),
    )


def _fields(lines: list[bytes]) -> dict[bytes, bytes]:
    """Header fields by lower-case name; those of one name are joined by commas."""
    fields: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        name = name.strip().lower()
        if not colon or not name:
            raise MalformedError("a header of the response cannot be parsed")
        fields[name] = fields[name] + b", " + value.strip() if name in fields else value.strip()
    return fields


def _words(fields: dict[bytes, bytes], name: bytes) -> list[str]:
    text = fields.get(name, b"").decode("latin-1").lower()
    return [word for part in text.split(",") if (word := part.partition(";")[0].strip())]


def _content_length(fields: dict[bytes, bytes]) -> int | None:
    if b"content-length" not in fields:
        return None
    values = {value.strip() for value in fields[b"content-length"].split(b",")}
    if len(values) != 1 or not _LENGTH.fullmatch(value := values.pop()):
        raise MalformedError("the Content-Length of the response is not a number")
    return int(value)


class _KnownEnding:
    """The length is known from the head."""

    __slots__ = ("end",)

    def __init__(self, end: int):
        self.end: int | None = end

    def reached(self, response: bytearray) -> bool:
        return len(response) >= self.end  # type: ignore[operator]

    find = reached


class _CloseEnding:
    """The response ends with [DONE] or with the connection."""

    __slots__ = ("end",)

    def __init__(self) -> None:
        self.end: int | None = None

    def reached(self, response: bytearray) -> bool:
        return has_done(response)

    find = reached


class _ChunkedEnding:
    """Chunks, the last chunk, optional trailers and an empty line; continues parsing where the last call ended."""

    __slots__ = ("_at", "_in_trailers", "end")

    def __init__(self, body_start: int):
        self._at = body_start  # start of the next chunk or trailer
        self._in_trailers = False
        self.end: int | None = None

    def reached(self, response: bytearray) -> bool:
        return response.endswith(_EMPTY_LINE) and (self._usual_end(response) or self.find(response))

    def _usual_end(self, response: bytearray) -> bool:
        """Whether the response ends with [DONE] and the last chunk, as nearly all do. Saves parsing the chunks, which
        would cost a tenth of reading them."""
        if response.endswith(_LAST_CHUNK) and has_done(response):
            self.end = len(response)
            return True
        return False

    def find(self, response: bytearray) -> bool:
        while not self._in_trailers:
            line = _line(response, self._at)
            if line is None:
                return False
            size = _SHORT_SIZES.get(line)
            size, start = _chunk_size(line) if size is None else size, self._at + len(line) + 2
            if size == 0:
                self._in_trailers, self._at = True, start
                break
            if len(response) < start + size + 2:
                return False
            if response[start + size : start + size + 2] != b"\r\n":
                raise MalformedError(LONG_CHUNK)
            self._at = start + size + 2
        while self.end is None:
            line = _line(response, self._at)
            if line is None:
                return False
            self._at += len(line) + 2
            if not line:
                self.end = self._at
        return True


def _line(response: bytearray | bytes, at: int) -> bytes | None:
    """The line at offset `at` without its line end; None while it is incomplete."""
    end = response.find(b"\r\n", at, at + _MAX_LINE_BYTES)
    if end < 0:
        if len(response) - at >= _MAX_LINE_BYTES:
            raise MalformedError(BAD_CHUNKS)
        return None
    return bytes(response[at:end])


def _chunk_size(line: bytes) -> int:
    match = _CHUNK_SIZE.fullmatch(line)
    if match is None:
        raise MalformedError(BAD_CHUNKS)
    return int(match[1], 16)


def has_done(response: bytearray | bytes) -> bool:
    """Whether the last bytes contain the event [DONE], which ends a stream."""
    return _DONE.search(response, max(0, len(response) - _TAIL_BYTES)) is not None


class Body:
    """The body of a response without framing and codings, and the place of its bytes in what was read.

    `ends` are the lengths of the response after each read: decoded bytes get the place of the read that completed them.
    `malformed` is a message if framing or coding is broken; `data` is then the part before.
    """

    def __init__(self, response: bytes, head: Head, ends: Sequence[int] = ()):
        self.malformed = ""
        self._starts: list[int] = []  # of each piece, in the body
        self._places: list[int] = []  # of each piece, in the response
        self._decoded = False  # True: all bytes of a piece have the same place
        if head.chunked:
            self.data = self._join_chunks(response, head.body_start)
        else:
            stop = len(response) if head.length is None else head.body_start + head.length
            self.data = response[head.body_start : stop]
            self._starts.append(0)
            self._places.append(head.body_start)
        if head.codings:
            self._decode(head.codings, list(ends) or [len(response)])

    def place(self, offset: int) -> int:
        """The offset in the response of the body's byte at `offset`."""
        piece = bisect_right(self._starts, offset) - 1
        return self._places[piece] + (0 if self._decoded else offset - self._starts[piece])

    def _join_chunks(self, response: bytes, at: int) -> bytes:
        pieces: list[bytes] = []
        total = 0
        try:
            while (line := _line(response, at)) is not None:
                size = _chunk_size(line)
                if size == 0:
                    break
                at += len(line) + 2
                piece = response[at : at + size]
                pieces.append(piece)
                self._starts.append(total)
                self._places.append(at)
                total += len(piece)
                at += size
                if response[at : at + 2] not in (b"\r\n", b"\r", b""):
                    raise MalformedError(LONG_CHUNK)
                at += 2
        except MalformedError as error:
            self.malformed = str(error)
        return b"".join(pieces)

    def _decode(self, codings: tuple[str, ...], ends: list[int]) -> None:
        """Decode read by read, so that each decoded byte gets the arrival time of its compressed bytes."""
        packed, self.data = self.data, b""
        cuts = [self._before(end, len(packed)) for end in ends]
        self._starts, self._places, self._decoded = [], [], True
        pieces: list[bytes] = []
        total = begin = 0
        try:
            steps: list[Decoder] = [decoder(coding, packed) for coding in reversed(codings)]
            for end, cut in zip(ends, cuts, strict=True):
                piece = packed[begin:cut]
                for step in steps:
                    piece = step(piece)
                if piece:
                    pieces.append(piece)
                    self._starts.append(total)
                    self._places.append(end - 1)
                    total += len(piece)
                begin = cut
        except CodingError as error:
            self.malformed = self.malformed or str(error)
        self.data = b"".join(pieces)

    def _before(self, end: int, size: int) -> int:
        """The number of body bytes before the response's offset `end`."""
        piece = bisect_left(self._places, end) - 1
        if piece < 0:
            return 0
        stop = self._starts[piece + 1] if piece + 1 < len(self._starts) else size
        return min(stop, self._starts[piece] + end - self._places[piece])
