"""What the device keeps for each slot, so that a step can follow another before the host has seen its tokens.

The host plans step n + 1 while step n runs. It knows how many tokens each slot has, but not yet their ids. So the
newest token of each slot stays on the device: `append_tokens` writes it at the end of step n, `gather_ids` reads it at
the start of step n + 1. Block tables and sampling parameters change rarely; `write_rows` and `write_elements` apply
their changes. Only the newest token is kept, not the whole sequence: what needs earlier tokens (penalties, bad words,
draft tokens) runs on the host, after the step before it, and 256 sequences of 128k tokens would take 134 MB.

Padded entries of a step have index -1 and are neither read nor written.
"""

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.launch import check_device, next_power_of_2

UNKNOWN = -1  # the id of a token that is sampled on the device and has not reached the host
SIZE = 256  # entries of a program
MAX_WIDTH = 1024  # columns of a program


@triton.jit(do_not_specialize=["n"])
def gather_ids_kernel(ids, last_token, slot_of, n, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    slot = tl.load(slot_of + i, mask=i < n, other=-1)
    unknown = (slot >= 0) & (tl.load(ids + i, mask=i < n, other=0) < 0)
    tl.store(ids + i, tl.load(last_token + slot, mask=unknown, other=0), mask=unknown)
    tl.store(ids + i, tl.zeros([SIZE], tl.int32), mask=(slot < 0) & (i < n))


@triton.jit(do_not_specialize=["n"])
def append_tokens_kernel(last_token, slots, tokens, n, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    slot = tl.load(slots + i, mask=i < n, other=-1)
    token = tl.load(tokens + i, mask=slot >= 0, other=0)
    tl.store(last_token + slot, token, mask=slot >= 0)


@triton.jit(do_not_specialize=["n"])
def write_elements_kernel(table, rows, columns, values, stride, n, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    row = tl.load(rows + i, mask=i < n, other=-1)
    valid = row >= 0
    at = row.to(tl.int64) * stride + tl.load(columns + i, mask=valid, other=0)
    tl.store(table + at, tl.load(values + i, mask=valid, other=0), mask=valid)


@triton.jit(do_not_specialize=["n"])
def write_rows_kernel(table, rows, values, stride, n, WIDTH: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(rows + i, mask=i < n, other=-1)
    valid = (row >= 0)[:, None] & (column < WIDTH)[None, :]
    value = tl.load(values + i.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=valid, other=0)
    tl.store(table + row.to(tl.int64)[:, None] * stride + column[None, :], value, mask=valid)


def gather_ids(ids: Tensor, last_token: Tensor, slot_of: Tensor) -> None:
    """Replace each UNKNOWN id by the newest token of its slot, and the ids of padded tokens by 0.

    Args:
        ids: int32[tokens], changed in place.
        last_token: int32[slots].
        slot_of: int32[tokens], the slot of each token; -1: padding.
    """
    check_device(ids, last_token, slot_of)
    if n := len(ids):
        gather_ids_kernel[(triton.cdiv(n, SIZE),)](ids, last_token, slot_of, n, SIZE=SIZE)


def append_tokens(last_token: Tensor, slots: Tensor, tokens: Tensor) -> None:
    """Make each of `tokens` int32[n] the newest token of its slot.

    Args:
        last_token: int32[slots], changed in place.
        slots: int32[n], different slots; -1: padding.
        tokens: int32[n].
    """
    check_device(last_token, slots, tokens)
    if n := len(slots):
        append_tokens_kernel[(triton.cdiv(n, SIZE),)](last_token, slots, tokens, n, SIZE=SIZE)


def write_rows(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write table[rows[i]] = values[i].

    Args:
        table: int32 or float32 [rows, width], its rows contiguous; changed in place.
        rows: int32[n], different rows; -1: padding.
        values: [n, width], of the table's dtype.
    """
    check_device(table, rows, values)
    _check_table(table, values)
    n, width = values.shape
    if not n:
        return
    columns = min(MAX_WIDTH, next_power_of_2(width))
    size = max(1, SIZE // columns)
    grid = (triton.cdiv(n, size), triton.cdiv(width, columns))
    write_rows_kernel[grid](table, rows, values, table.stride(0), n, WIDTH=width, SIZE=size, COLUMNS=columns)


def write_elements(table: Tensor, rows: Tensor, columns: Tensor, values: Tensor) -> None:
    """Write table[rows[i], columns[i]] = values[i], e.g. the new blocks of a step into block tables.

    Args:
        table: int32 or float32 [rows, width], its rows contiguous; changed in place.
        rows, columns: int32[n], different places; a row of -1: padding.
        values: [n], of the table's dtype.
    """
    check_device(table, rows, columns, values)
    _check_table(table, values)
    if n := len(values):
        write_elements_kernel[(triton.cdiv(n, SIZE),)](table, rows, columns, values, table.stride(0), n, SIZE=SIZE)


def _check_table(table: Tensor, values: Tensor) -> None:
    if table.dtype != values.dtype:
        raise ValueError(f"values of {values.dtype} can't be written into a table of {table.dtype}")
    if table.stride(1) != 1:
        raise ValueError("the rows of a table must be contiguous")
