"""y = x W^T in fp8 (e4m3): weights with a scale for each output, activations quantized row by row as they come.

The product is `torch._scaled_mm`, which needs tensor cores that multiply fp8 (compute capability 8.9 or higher); it
scales rows and outputs only for results in bfloat16. On the CPU it exists too, but is slow. `reference` computes the
same in float32.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.kv_storage import to_stored
from engine.kernels.triton.launch import check_device, next_power_of_2

LARGEST = 448.0  # of e4m3
ELEMENTS = 16 << 20  # of a weight, quantized at a time: one intermediate in float32 has 64 MiB
MULTIPLE = 16  # of inputs and outputs that `torch._scaled_mm` multiplies

_LARGEST = tl.constexpr(LARGEST)


@triton.jit
def quantize_rows_kernel(x, out, scales, row_stride, INPUTS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDTH)
    value = tl.load(x + row * row_stride + i, mask=i < INPUTS, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), 0)
    scale = tl.where(largest > 0.0, largest / _LARGEST, 1.0)
    stored = to_stored(value / scale, _LARGEST, out.dtype.element_ty)
    tl.store(out + row * INPUTS + i, stored, mask=i < INPUTS)
    tl.store(scales + row, scale)


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A weight; values: float8_e4m3fn[outputs, inputs], scales: float32[outputs]."""

    values: Tensor
    scales: Tensor


def quantize_fp8(weight: Tensor) -> Fp8Weight:
    """Quantize a weight [outputs, inputs]; each output's scale is its largest magnitude / LARGEST."""
    values, rows = weight.new_empty(weight.shape, dtype=torch.float8_e4m3fn), max(1, ELEMENTS // weight.shape[1])
    scales = weight.new_empty((len(weight),), dtype=torch.float32)
    for first in range(0, len(weight), rows):
        here = slice(first, first + rows)
        band = weight[here].float()
        largest = band.abs().amax(1)
        scales[here] = torch.where(largest > 0, largest / LARGEST, 1.0)
        values[here] = (band / scales[here, None]).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return Fp8Weight(values, scales)


def refusal(outputs: int, inputs: int) -> str | None:
    """Why `torch._scaled_mm` can't multiply by a weight [outputs, inputs]; None if it can."""
    if outputs % MULTIPLE or inputs % MULTIPLE:
        return f"fp8 products need inputs and outputs in multiples of {MULTIPLE}, not {inputs} and {outputs}"
    return None


def quantize_rows(x: Tensor, values: Tensor, scales: Tensor) -> None:
    """Quantize activations; each row's scale is its largest magnitude / LARGEST.

    Args:
        x: [rows, inputs]; rows may be apart.
        values: float8_e4m3fn[rows, inputs].
        scales: float32[rows].
    """
    check_device(x, values, scales)
    rows, inputs = x.shape
    if rows:
        width = next_power_of_2(inputs)
        quantize_rows_kernel[(rows,)](
            x, values, scales, x.stride(0), INPUTS=inputs, WIDTH=width, num_warps=quantize_warps(width)
        )


def quantize_warps(width: int) -> int:
    """Warps of a program that quantizes rows of `width` inputs."""
    return min(16, max(1, width // 512))


def fp8_linear(x: Tensor, weight: Fp8Weight, values: Tensor, scales: Tensor) -> Tensor:
    """x W^T in bfloat16, by `torch._scaled_mm`; only where there is no `refusal`.

    Args:
        x: [rows, inputs]; rows may be apart.
        values: float8_e4m3fn[rows, inputs], workspace.
        scales: float32[rows], workspace.
    """
    quantize_rows(x, values, scales)
    return torch._scaled_mm(
        values, weight.values.T, scale_a=scales[:, None], scale_b=weight.scales[None, :], out_dtype=torch.bfloat16
    )


def reference(values: Tensor, scales: Tensor, weight: Fp8Weight) -> Tensor:
    """The product of quantized activations and weights in float32, on any device."""
    return (values.float() @ weight.values.float().T) * scales[:, None] * weight.scales[None, :]
