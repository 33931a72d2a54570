"""Content codings of an answer, undone piece by piece: what a piece of the packed bytes completes comes out with it."""

import zlib
from collections.abc import Callable

Decoder = Callable[[bytes], bytes]
MAX_BYTES = 1 << 28  # of one unpacked answer: far beyond any stream of tokens, and it fits into memory
_GZIP, _ZLIB, _RAW = 31, 15, -15  # zlib's names of the three formats: window bits


class CodingError(Exception):
    """The bytes are not packed as the answer says, or in a way that isn't read here."""


def decoder(coding: str, packed: bytes) -> Decoder:
    """What undoes `coding` (as in Content-Encoding) of a body that begins like `packed`; raises CodingError."""
    if coding in ("gzip", "x-gzip"):
        return _Inflate(coding, _GZIP)
    if coding == "deflate":
        # RFC 9110 means the zlib format; many servers send it bare. Its two bytes of header tell them apart.
        wrapped = len(packed) < 2 or (packed[0] & 15 == 8 and (packed[0] * 256 + packed[1]) % 31 == 0)
        return _Inflate(coding, _ZLIB if wrapped else _RAW)
    raise CodingError(f"the answer has the Content-Encoding {coding!r}, which can't be read; gzip and deflate can")


class _Inflate:
    """The stream of one answer; gzip may hold several members."""

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
                raise CodingError(f"the answer is not packed with {self._coding} as it says") from None
            self._total += len(found[-1])
            if self._total > MAX_BYTES:
                raise CodingError(f"the answer unpacks to more than {MAX_BYTES >> 20} MiB")
            piece = self._stream.unused_data
        return b"".join(found)
