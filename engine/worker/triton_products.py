"""Products with quantized weights, by kernels in Triton and `torch._scaled_mm`. Needs the package `triton`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.quantization import GROUPS, quantize
from engine.kernels.triton import fp8, quantized
from engine.kernels.triton.fp8 import Fp8Weight, fp8_linear, quantize_fp8
from engine.kernels.triton.quantized import IntegerWeight, LinearWorkspace, pack_integers
from engine.worker.device import Device
from engine.worker.linear_products import LinearFormats


@dataclass(frozen=True, slots=True)
class IntegerProduct:
    """Implements `engine.worker.linear_products.Product` for int8 and int4."""

    weight: IntegerWeight
    bias: Tensor | None
    workspace: LinearWorkspace

    def __call__(self, x: Tensor) -> Tensor:
        out = x.new_empty(len(x), self.weight.outputs)
        quantized.linear(x, self.weight, out, self.workspace)
        return out if self.bias is None else out.add_(self.bias)


class IntegerFormat:
    """Implements `ProductFormat`: int8 or int4 with the CPU's rounding; activations stay as they are."""

    def __init__(self, kind: str, workspace: LinearWorkspace):
        self._kind = kind
        self._workspace = workspace

    def refusal(self, outputs: int, inputs: int) -> str | None:  # noqa: ARG002
        group = GROUPS[self._kind]
        return f"{inputs} inputs are not a multiple of {group}" if inputs % group else None

    def make(self, weight: Tensor, bias: Tensor | None) -> IntegerProduct:
        found = quantize(weight, self._kind, fp8.ELEMENTS)
        packed = pack_integers(found.integers, found.scales, found.minimums)
        return IntegerProduct(packed, bias, self._workspace)


@dataclass(frozen=True, slots=True)
class Fp8Product:
    """Implements `engine.worker.linear_products.Product` for fp8."""

    weight: Fp8Weight
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        values = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
        scales = x.new_empty((len(x),), dtype=torch.float32)
        out = fp8_linear(x, self.weight, values, scales)
        return out if self.bias is None else out.add_(self.bias)


class Fp8Format:
    """Implements `ProductFormat`: e4m3, activations are quantized row by row."""

    def refusal(self, outputs: int, inputs: int) -> str | None:
        return fp8.refusal(outputs, inputs)

    def make(self, weight: Tensor, bias: Tensor | None) -> Fp8Product:
        return Fp8Product(quantize_fp8(weight), bias)


def quantized_formats(quantization: str, dtype: torch.dtype, device: Device) -> LinearFormats:
    """The forms of `--quantization`. The head stays int8 where the layers are int4: 4 bits are too few for it."""
    if quantization == "fp8":
        return LinearFormats(Fp8Format(), Fp8Format())
    workspace = LinearWorkspace.allocate(device.zeros, dtype)
    return LinearFormats(IntegerFormat(quantization, workspace), IntegerFormat("int8", workspace))
