"""y = x W^T with weights W [outputs, inputs] in int8 or int4, which are read as they are and converted in registers.

The inputs of an output are divided into groups of 32, 64 or 128. int8: weight = integer * scale of its group.

int4: weight = integer * scale + minimum, with integers 0 to 15. A group's bytes hold its first half in the low four
bits and its second half in the high ones, so that each half is unpacked by one operation and multiplied by activations
that lie side by side. With groups of 32, and inputs numbered from the group's first:

    byte of the group     0      1      2    ...   15
    low four bits         0      1      2    ...   15
    high four bits       16     17     18    ...   31

Scales and minimums are applied to the sums of a group, not to each weight: with integers q and activations a,
sum(a (q s + m)) = s sum(a q) + m sum(a). The products of integers have the accuracy of float32 sums.

For more than FEW_ROWS rows (16 in float32) the tensor cores have enough to do that weights are converted into a
workspace first, a part of the outputs at a time, and multiplied by torch. For few rows the weights' bytes are what
takes time. Then programs divide the inputs of an output among them if outputs alone make too few programs; their sums
are added in a fixed order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.launch import check_device, dot_dtype, dot_precision, interpreted, next_power_of_2

FEW_ROWS = 64
GROUPS = (32, 64, 128)  # inputs of a group
INPUTS_PER_STEP = 128  # inputs that a program multiplies at a time
OUTPUTS_PER_PROGRAM = 32
MIN_ROWS = 16  # of an operand of tl.dot
MAX_SPLITS = 8
PROGRAMS = 512  # about four for each multiprocessor of an H100
CONVERTED = 4096  # weights that a program converts
ADDED = 1024  # outputs whose partial sums a program adds
# Splits double the number of programs while it is below PROGRAMS, so fewer than twice as many write partial sums.
PARTIALS = 2 * PROGRAMS * OUTPUTS_PER_PROGRAM * FEW_ROWS
CONVERTED_AT_ONCE = 16 << 20  # weights in the workspace: 32 MiB in bfloat16, which the L2 cache of an H100 holds


@triton.jit(do_not_specialize=["rows"])
def int8_kernel(
    x, weight, scales, out, partials, rows, row_stride,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, GROUP: tl.constexpr, UNROLL: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m, n, part = tl.arange(0, ROWS), tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1)
    TOTAL: tl.constexpr = INPUTS // GROUP
    STEPS: tl.constexpr = (TOTAL + UNROLL - 1) // UNROLL
    EACH: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    acc = tl.zeros([ROWS, N], tl.float32)
    for step in range(part * EACH, tl.minimum((part + 1) * EACH, STEPS)):
        for i in tl.static_range(UNROLL):
            group = step * UNROLL + i
            k = group * GROUP + tl.arange(0, GROUP)
            a = tl.load(x + m[:, None] * row_stride + k[None, :], mask=(m < rows)[:, None] & (group < TOTAL), other=0.0)
            some = (n < OUTPUTS) & (group < TOTAL)
            q = tl.load(weight + n.to(tl.int64)[None, :] * INPUTS + k[:, None], mask=some[None, :], other=0)
            products = tl.dot(a.to(DOT), q.to(tl.float32).to(DOT), input_precision=PRECISION)
            scale = tl.load(scales + n.to(tl.int64) * TOTAL + group, mask=some, other=0.0).to(tl.float32)
            acc += products * scale[None, :]
    _store(acc, m, n, part, out, partials, rows, OUTPUTS, SPLITS)


@triton.jit(do_not_specialize=["rows"])
def int4_kernel(
    x, weight, scales, minimums, out, partials, rows, row_stride,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, GROUP: tl.constexpr, UNROLL: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m, n, part = tl.arange(0, ROWS), tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1)
    HALF: tl.constexpr = GROUP // 2
    TOTAL: tl.constexpr = INPUTS // GROUP
    STEPS: tl.constexpr = (TOTAL + UNROLL - 1) // UNROLL
    EACH: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    k = tl.arange(0, HALF)
    acc = tl.zeros([ROWS, N], tl.float32)
    for step in range(part * EACH, tl.minimum((part + 1) * EACH, STEPS)):
        for i in tl.static_range(UNROLL):
            group = step * UNROLL + i
            some = (m < rows)[:, None] & (group < TOTAL)
            column = group * GROUP + k
            low = tl.load(x + m[:, None] * row_stride + column[None, :], mask=some, other=0.0)
            high = tl.load(x + m[:, None] * row_stride + (column + HALF)[None, :], mask=some, other=0.0)
            some = (n < OUTPUTS) & (group < TOTAL)
            at = n.to(tl.int64)[None, :] * (INPUTS // 2) + (group * HALF + k)[:, None]
            packed = tl.load(weight + at, mask=some[None, :], other=0).to(tl.int32)
            products = tl.dot(low.to(DOT), (packed & 15).to(tl.float32).to(DOT), input_precision=PRECISION)
            products = tl.dot(high.to(DOT), (packed >> 4).to(tl.float32).to(DOT), products, input_precision=PRECISION)
            at = n.to(tl.int64) * TOTAL + group
            scale = tl.load(scales + at, mask=some, other=0.0).to(tl.float32)
            minimum = tl.load(minimums + at, mask=some, other=0.0).to(tl.float32)
            activations = tl.sum(low.to(tl.float32) + high.to(tl.float32), 1)
            acc += products * scale[None, :] + activations[:, None] * minimum[None, :]
    _store(acc, m, n, part, out, partials, rows, OUTPUTS, SPLITS)


@triton.jit
def _store(acc, m, n, part, out, partials, rows, OUTPUTS: tl.constexpr, SPLITS: tl.constexpr):
    some = (m < rows)[:, None] & (n < OUTPUTS)[None, :]
    at = m.to(tl.int64)[:, None] * OUTPUTS + n[None, :]
    if SPLITS == 1:
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=some)
    else:
        tl.store(partials + part * rows.to(tl.int64) * OUTPUTS + at, acc, mask=some)


@triton.jit(do_not_specialize=["n"])
def add_partials_kernel(partials, out, n, SPLITS: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    for part in tl.static_range(SPLITS):
        total += tl.load(partials + part * n.to(tl.int64) + i, mask=i < n, other=0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < n)


@triton.jit
def convert_kernel(
    weight, scales, minimums, out, first, end,
    INPUTS: tl.constexpr, GROUP: tl.constexpr, INT4: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the outputs from `first` to `end` as [end - first, INPUTS]."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = first + r
    k = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    some = (n < end)[:, None] & (k < INPUTS)[None, :]
    row = n.to(tl.int64)[:, None]
    group = row * (INPUTS // GROUP) + (k // GROUP)[None, :]
    scale = tl.load(scales + group, mask=some, other=0.0).to(tl.float32)
    if INT4:
        HALF: tl.constexpr = GROUP // 2
        at = row * (INPUTS // 2) + (k // GROUP * HALF + k % HALF)[None, :]
        packed = tl.load(weight + at, mask=some, other=0).to(tl.int32)
        q = tl.where((k % GROUP < HALF)[None, :], packed & 15, packed >> 4).to(tl.float32)
        value = q * scale + tl.load(minimums + group, mask=some, other=0.0).to(tl.float32)
    else:
        value = tl.load(weight + row * INPUTS + k[None, :], mask=some, other=0).to(tl.float32) * scale
    to = r.to(tl.int64)[:, None] * INPUTS + k[None, :]
    tl.store(out + to, value.to(out.dtype.element_ty), mask=some)


@dataclass(frozen=True, slots=True)
class IntegerWeight:
    """A weight [outputs, inputs] in int8 or int4, see above.

    integers: int8[outputs, inputs], or uint8[outputs, inputs / 2] for int4; scales: [outputs, groups]; minimums:
    [outputs, groups] for int4, None for int8.
    """

    integers: Tensor
    scales: Tensor
    minimums: Tensor | None = None

    @property
    def outputs(self) -> int:
        return len(self.integers)

    @property
    def inputs(self) -> int:
        return self.integers.shape[1] * (1 if self.minimums is None else 2)

    @property
    def group(self) -> int:
        """Inputs of a group."""
        return self.inputs // self.scales.shape[1]


def pack_integers(integers: Tensor, scales: Tensor, minimums: Tensor | None) -> IntegerWeight:
    """Lay out integers [outputs, inputs] as the kernels read them.

    Args:
        integers: int8, or uint8 from 0 to 15 if there are minimums.
        scales, minimums: [outputs, groups].

    Raises:
        ValueError: the groups have a size that kernels don't support.
    """
    outputs, inputs = integers.shape
    group, rest = divmod(inputs, scales.shape[1])
    if group not in GROUPS or rest:
        raise ValueError(f"integer weights need groups of {', '.join(map(str, GROUPS))} inputs, not {group}")
    if minimums is None:
        return IntegerWeight(integers.contiguous(), scales)
    halves = integers.view(outputs, -1, 2, group // 2)
    return IntegerWeight((halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1).contiguous(), scales, minimums)


@dataclass(frozen=True, slots=True)
class LinearWorkspace:
    """Memory that all products share; allocated once, so that a captured graph can use it.

    partials: float32[n], for few rows; PARTIALS are enough for all weights.
    weights: [n] in the dtype of the activations, for many rows; some multiple of the inputs.
    """

    partials: Tensor
    weights: Tensor

    @classmethod
    def allocate(cls, zeros: Callable[[tuple[int, ...], torch.dtype], Tensor], dtype: torch.dtype) -> "LinearWorkspace":
        """A workspace for activations of this dtype."""
        return cls(zeros((PARTIALS,), torch.float32), zeros((CONVERTED_AT_ONCE,), dtype))

    @staticmethod
    def bytes(itemsize: int) -> int:
        """Of a workspace that `allocate` makes for activations of `itemsize` bytes."""
        return 4 * PARTIALS + itemsize * CONVERTED_AT_ONCE


def linear(x: Tensor, weight: IntegerWeight, out: Tensor, workspace: LinearWorkspace) -> None:
    """Write x W^T to `out`.

    Args:
        x: [rows, inputs] in float32, float16 or bfloat16; rows may be apart.
        weight: W.
        out: [rows, outputs], contiguous, in the dtype of x.
        workspace: shared by products that follow each other.

    Raises:
        ValueError: the shapes don't fit, or the workspace is too small.
    """
    check_device(x, weight.integers, weight.scales, weight.minimums, out, workspace.partials, workspace.weights)
    rows, inputs = x.shape
    if inputs != weight.inputs or out.shape != (rows, weight.outputs) or not out.is_contiguous() or x.stride(1) != 1:
        raise ValueError(f"{tuple(x.shape)} times {weight.outputs, weight.inputs} isn't {tuple(out.shape)}, contiguous")
    if not rows:
        return
    if rows > few_rows(x.dtype):
        _convert_and_multiply(x, weight, out, workspace.weights)
    else:
        _multiply_few(x, weight, out, workspace.partials)


def few_rows_constants(
    rows: int, outputs: int, inputs: int, group: int, dtype: torch.dtype, amd: bool
) -> dict[str, Any]:
    """The constants of a product of few rows with a weight in int8 or int4."""
    size = OUTPUTS_PER_PROGRAM if not interpreted() else max(MIN_ROWS, next_power_of_2(outputs))
    splits = count_splits(triton.cdiv(outputs, size), triton.cdiv(inputs, INPUTS_PER_STEP))
    return {
        "OUTPUTS": outputs, "INPUTS": inputs, "GROUP": group,
        "UNROLL": 1 if _one_group(dtype, amd) else INPUTS_PER_STEP // group,
        "SPLITS": splits, "ROWS": max(MIN_ROWS, next_power_of_2(rows)), "N": size,
        "DOT": dot_dtype(dtype), "PRECISION": dot_precision(dtype),
    }  # fmt: skip


def few_rows_options(rows: int, dtype: torch.dtype, amd: bool) -> dict[str, int]:
    """How such a product is compiled."""
    # 32 rows of int4 in float16 with 4 warps spilled 20 bytes on sm_100.
    few = MIN_ROWS if dtype == torch.float16 else FEW_ROWS // 2
    return {"num_warps": 4 if rows <= few else 8, "num_stages": 2 if _one_group(dtype, amd) else 4}


def few_rows(dtype: torch.dtype) -> int:
    """How many rows are few. Products in float32 are not on tensor cores, and with more rows they spill registers."""
    return MIN_ROWS if dtype == torch.float32 else FEW_ROWS


def _one_group(dtype: torch.dtype, amd: bool) -> bool:
    """Whether a program takes one group at a time: more would spill registers."""
    return amd or dtype == torch.float32


def _multiply_few(x: Tensor, weight: IntegerWeight, out: Tensor, partials: Tensor) -> None:
    rows, outputs = out.shape
    amd = torch.version.hip is not None
    constants = few_rows_constants(rows, outputs, weight.inputs, weight.group, x.dtype, amd)
    splits = constants["SPLITS"]
    if splits > 1 and partials.numel() < splits * rows * outputs:
        raise ValueError(f"the workspace has {partials.numel()} partial sums, not {splits * rows * outputs}")
    options, stored = constants | few_rows_options(rows, x.dtype, amd), (weight.integers, weight.scales)
    grid = triton.cdiv(outputs, constants["N"]), splits
    if weight.minimums is None:
        int8_kernel[grid](x, *stored, out, partials, rows, x.stride(0), **options)
    else:
        int4_kernel[grid](x, *stored, weight.minimums, out, partials, rows, x.stride(0), **options)
    if splits > 1:
        add_partials_kernel[(triton.cdiv(rows * outputs, ADDED),)](
            partials, out, rows * outputs, SPLITS=splits, SIZE=ADDED
        )


def count_splits(blocks: int, steps: int) -> int:
    """How many programs divide the inputs of an output: the fewest that make PROGRAMS, with 4 steps each or more."""
    splits = 1
    while splits < MAX_SPLITS and blocks * splits < PROGRAMS and steps // (2 * splits) >= 4:
        splits *= 2
    return splits


def _convert_and_multiply(x: Tensor, weight: IntegerWeight, out: Tensor, workspace: Tensor) -> None:
    """Convert as many outputs at a time as the workspace has room for, and multiply by torch."""
    inputs, outputs = weight.inputs, weight.outputs
    each = min(workspace.numel() // inputs, outputs)
    if not each or workspace.dtype != x.dtype:
        raise ValueError(f"the workspace has no room for an output of {inputs} weights in {x.dtype}")
    for first in range(0, outputs, each):
        end = min(first + each, outputs)
        part = workspace[: (end - first) * inputs].view(end - first, inputs)
        convert(weight, part, first)
        torch.mm(x, part.T, out=out if each == outputs else out[:, first:end])


def convert(weight: IntegerWeight, out: Tensor, first: int = 0) -> None:
    """Write the weights of the outputs from `first` on to `out` [n, inputs], in its dtype."""
    n, inputs = out.shape
    constants = convert_constants(inputs, weight.group, weight.minimums is not None)
    convert_kernel[(triton.cdiv(n, constants["ROWS"]), triton.cdiv(inputs, constants["WIDTH"]))](
        weight.integers, weight.scales, weight.scales if weight.minimums is None else weight.minimums,
        out, first, first + n, **constants,
    )  # fmt: skip


def convert_constants(inputs: int, group: int, int4: bool) -> dict[str, Any]:
    """The constants of a conversion of weights."""
    width = min(next_power_of_2(inputs), 1024)
    size = max(1, (CONVERTED if not interpreted() else 1 << 18) // width)
    return {"INPUTS": inputs, "GROUP": group, "INT4": int4, "WIDTH": width, "ROWS": size}
