"""Numbers in messages: columns as little-endian bytes, and tables of integers in few bytes.

`column()` packs a column; `int32s()`, `int64s()` and `float32s()` read one without a copy.

A table takes the place of hundreds of records in a message. It is packed column by column: the first value, then the
differences between consecutive values, with as many bytes per difference as the largest one needs. If all differences
of a column are equal, only one is stored.

    int32 first │ int8 width, negative: all differences are equal │ differences
"""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.arrays import Int32s

_HEAD = struct.Struct("<ib")
_KINDS: dict[int, np.dtype[np.signedinteger]] = {width: np.dtype(f"<i{width}") for width in (1, 2, 4, 8)}


def column(values: Sequence[int] | Sequence[Sequence[int]] | NDArray[Any], kind: str = "<i4") -> bytes:
    """Pack numbers as little-endian bytes, int32 by default."""
    return np.asarray(values, dtype=kind).tobytes()


def int32s(data: bytes, width: int = 1) -> Int32s:
    """A read-only view of an int32 column: [n], or [n, width]."""
    flat = np.frombuffer(data, dtype="<i4")
    return flat if width == 1 else flat.reshape(-1, width)


def int64s(data: bytes) -> NDArray[np.int64]:
    return np.frombuffer(data, dtype="<i8")


def float32s(data: bytes, width: int = 1) -> NDArray[np.float32]:
    flat = np.frombuffer(data, dtype="<f4")
    return flat if width == 1 else flat.reshape(-1, width)


def pack_table(table: Int32s) -> bytes:
    """Pack a table [n, columns], with n at least 2."""
    parts = []
    for column in table.T.astype(np.int64):
        steps = np.diff(column)
        low, high = int(steps.min()), int(steps.max())
        width = next(
            width for width, kind in _KINDS.items() if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max
        )
        all_equal = low == high
        parts.append(_HEAD.pack(int(column[0]), -width if all_equal else width))
        parts.append((steps[:1] if all_equal else steps).astype(_KINDS[width]).tobytes())
    return b"".join(parts)


def unpack_table(data: bytes, rows: int, columns: int) -> Int32s:
    """Unpack a table [rows, columns]."""
    table, at = np.empty((rows, columns), np.int64), 0
    for column in table.T:
        first, width = _HEAD.unpack_from(data, at)
        count = 1 if width < 0 else rows - 1
        steps = np.frombuffer(data, _KINDS[abs(width)], count, at + _HEAD.size)
        at += _HEAD.size + steps.nbytes
        column[0], column[1:] = first, steps
        np.cumsum(column, out=column)
    return table.astype(np.int32)
