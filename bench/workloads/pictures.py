"""Images as data: URLs, and marked copies that no cache contains."""

import base64
import hashlib
import io
from pathlib import Path
from typing import Any

from bench.errors import BenchError

_KINDS = ((b"\xff\xd8\xff", "jpeg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"RIFF", "webp"))
_CELL, _CELLS = 8, 4  # size in pixels and number of the mark's cells; the mark survives JPEG compression


def picture_bytes(stored: Any) -> bytes:
    """The encoded image of a row: bytes, a path, or {"bytes": …, "path": …}; raises BenchError."""
    if isinstance(stored, dict):
        stored = stored.get("bytes") or stored.get("path")
    if isinstance(stored, str):
        try:
            return Path(stored).read_bytes()
        except OSError as error:
            raise BenchError(f"the image {stored} cannot be read: {error.strerror} (--dataset)") from None
    if isinstance(stored, bytes | bytearray):
        return bytes(stored)
    raise BenchError(f"an image of the data set is stored as {type(stored).__name__}, not as bytes (--dataset)")


def data_url(content: bytes) -> str:
    kind = next((name for start, name in _KINDS if content.startswith(start)), "jpeg")
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def marked(content: bytes, salt: str) -> bytes:
    """The image with a mark in its lower right corner that depends on `salt`.

    Servers cache images by their pixels, so changing other bytes of the file would not suffice.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as opened:
            kind = opened.format
            picture = opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise BenchError(f"an image of the data set cannot be read: {error} (--dataset)") from None
    mark(picture, salt)
    out = io.BytesIO()
    if kind == "PNG":
        picture.save(out, "PNG", compress_level=1)
    else:
        picture.save(out, "JPEG", quality=90)
    return out.getvalue()


def mark(picture: Any, salt: str) -> None:
    """Draw a mark that depends on `salt` into the lower right corner of an RGB image of PIL."""
    colors = hashlib.blake2b(salt.encode(), digest_size=3 * _CELLS).digest()
    width, height = picture.size
    for i in range(_CELLS):
        color = tuple(colors[3 * i : 3 * i + 3])
        left = max(0, width - (i + 1) * _CELL)
        picture.paste(color, (left, max(0, height - _CELL), max(1, width - i * _CELL), height))
