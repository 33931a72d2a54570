"""Incremental decoding of compressed responses: each piece of compressed bytes returns what it completes."""

import zlib
from collections.abc import Callable

Decoder = Callable[[bytes], bytes]
MAX_BYTES = 1 << 28  # limit of one decompressed response
_GZIP, _ZLIB, _RAW = 31, 15, -15  # zlib's window bits for the three formats


class CodingError(Exception):
    """The bytes are not compressed as Content-Encoding declares, or the coding is not supported."""


def decoder(coding: str, packed: bytes) -> Decoder:
    """A decoder for `coding` (as in Content-Encoding) and a body that begins with `packed`; raises CodingError."""
    if coding in ("gzip", "x-gzip"):
        return _Inflate(coding, _GZIP)
    if coding == "deflate":
        # RFC 9110 means the zlib format, but many servers send raw deflate. The two header bytes distinguish them.
        wrapped = len(packed) < 2 or (packed[0] & 15 == 8 and (packed[0] * 256 + packed[1]) % 31 == 0)
        return _Inflate(coding, _ZLIB if wrapped else _RAW)
    raise CodingError(f"the response has the unsupported Content-Encoding {coding!r}; gzip and deflate are supported")


class _Inflate:
    """The stream of one response; gzip may have several members."""

    def __init__(self, coding: str, bits: int):
        self._coding = coding
        self._bits = bits
        self._stream = zlib.decompressobj(bits)
        self._total = 0

    def __call__(self, piece: bytes) -> bytes:
        found: list[bytes] = []
        while piece:
            if self._stream.eof:
                self._stream = zlib.decompressobj(self._bits)
            try:
                found.append(self._stream.decompress(piece, MAX_BYTES + 1 - self._total))
            except zlib.error:
                raise CodingError(f"the response has Content-Encoding {self._coding}, but other bytes") from None
            self._total += len(found[-1])
            if self._total > MAX_BYTES:
                raise CodingError(f"the decompressed response exceeds {MAX_BYTES >> 20} MiB")
            piece = self._stream.unused_data
        return b"".join(found)
