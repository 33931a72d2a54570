"""How long a matrix product takes on named hardware."""

from bisect import bisect_left
from typing import Protocol

from engine.errors import ConfigError
from engine.hardware.description import Gemm, GemmTable, Hardware

# Bytes of a number; those of fp4 share a scale of one byte among 16.
ITEM_BYTES = {"bf16": 2.0, "fp8": 1.0, "fp4": 0.5 + 1 / 16}
QUANTIZE_MEMORY = 0.7  # part of the bandwidth at which inputs are quantized


class Products(Protocol):
    """Times of products of one dtype of the weights."""

    def seconds(self, m: int, k: int, n: int) -> float:
        """An m x k matrix of activations by a k x n matrix of weights."""
        ...


def products_of(hardware: Hardware, dtype: str) -> Products:
    """The measured products of a dtype, or else the fit. Raises ConfigError if the hardware has no such products."""
    if dtype == "bf16" and hardware.gemm.bf16_table is not None:
        return MeasuredProducts(hardware.gemm.bf16_table)
    return GemmModel(hardware, dtype)


class MeasuredProducts:
    """Products in bf16 whose time is proportional to the weights, at a rate that depends on the rows of activations.

    Between the rows of the table it is interpolated; beyond the last one it is proportional to the rows.
    """

    def __init__(self, table: GemmTable):
        self._rows, self._seconds = table.rows, [ps * 1e-12 for ps in table.weight_ps]

    def seconds(self, m: int, k: int, n: int) -> float:
        return self._of_weight(m) * k * n

    def _of_weight(self, m: int) -> float:
        rows, seconds = self._rows, self._seconds
        at = bisect_left(rows, m)
        if at == len(rows):
            return seconds[-1] * m / rows[-1]
        if at == 0:
            return seconds[0]
        part = (m - rows[at - 1]) / (rows[at] - rows[at - 1])
        return seconds[at - 1] + part * (seconds[at] - seconds[at - 1])


class GemmModel:
    """Times of products of one dtype of the weights: bf16, fp8 or fp4. Raises ConfigError if the hardware has none.

    A roofline with a smooth corner: launch + (compute^s + memory^s)^(1/s). Computing takes 1 + half_depth / k times as
    long where the shared dimension k is short.
    """

    def __init__(self, hardware: Hardware, dtype: str):
        fit: Gemm | None = getattr(hardware.gemm, dtype, None)
        peak: float | None = getattr(hardware.peak_tflops, dtype, None)
        if fit is None or peak is None:
            raise ConfigError(
                f"{hardware.title} has no products in {dtype}: use --dtype bfloat16 without --quantization"
            )
        self._launch = fit.launch_us * 1e-6
        self._rate = fit.compute * peak * 1e12
        self._bandwidth = fit.memory * hardware.bandwidth
        self._quantize = fit.quantize_bytes / (QUANTIZE_MEMORY * hardware.bandwidth)
        self._sharpness, self._half_depth = fit.sharpness, fit.half_depth
        self._item_bytes = ITEM_BYTES[dtype]

    def seconds(self, m: int, k: int, n: int) -> float:
        """An m x k matrix of activations by a k x n matrix of weights, with a bfloat16 result."""
        compute = 2 * m * n * k / self._rate * (1 + self._half_depth / k)
        memory = (self._item_bytes * (n * k + m * k) + 2 * m * n) / self._bandwidth
        s = self._sharpness
        # The larger factor is taken out, so that the powers neither underflow nor overflow.
        most = max(compute, memory)
        corner = most * ((compute / most) ** s + (memory / most) ** s) ** (1 / s)
        return self._launch + self._quantize * m * k + corner
