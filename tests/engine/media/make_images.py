"""Makes image files for tests, also such as no encoder would write."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, depth: int = 8, color: int = 2) -> bytes:
    return SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))


def png(values: np.ndarray[Any, Any], *extra: bytes) -> bytes:
    """A PNG of uint8 or uint16 values, [rows, columns] or [rows, columns, 3], with `extra` chunks before the pixels."""
    rows, columns = values.shape[:2]
    depth, color = values.dtype.itemsize * 8, 0 if values.ndim == 2 else 2
    lines = b"".join(b"\0" + row.astype(values.dtype.newbyteorder(">")).tobytes() for row in values)
    header = png_header(columns, rows, depth, color)
    return header + b"".join(extra) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def text_bomb(megabytes: int) -> bytes:
    """A compressed text chunk that is `megabytes` MiB when decompressed."""
    squeezer = zlib.compressobj(9)
    packed = b"".join(squeezer.compress(bytes(1 << 20)) for _ in range(megabytes)) + squeezer.flush()
    return chunk(b"zTXt", b"Comment\0\0" + packed)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int = 40, height: int = 24, bands: int = 3, seed: int = 0) -> np.ndarray[Any, Any]:
    shape = (height, width) if bands == 1 else (height, width, bands)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
