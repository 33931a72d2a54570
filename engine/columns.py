"""Packs tables of integers for messages that would otherwise carry hundreds of records.

A table is packed column by column: the first value, then the differences between consecutive values, with as many bytes
per difference as the largest one needs. If all differences of a column are equal, only one is stored.

    int32 first │ int8 width, negative: all differences are equal │ differences
"""

import struct

import numpy as np

from engine.arrays import Int32s

_HEAD = struct.Struct("<ib")
_KINDS: dict[int, np.dtype[np.signedinteger]] = {width: np.dtype(f"<i{width}") for width in (1, 2, 4, 8)}


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
