"""Products with random int8 and int4 weights on a device, checked against float64."""

from dataclasses import replace

import torch
from torch import Tensor

from engine.kernels.triton.quantized import (
    FEW_ROWS,
    MAX_SPLITS,
    IntegerWeight,
    LinearWorkspace,
    linear,
    pack_integers,
)
from tests.engine.kernels.triton.numbers import poisoned, random_numbers

Place = torch.device | str
# Of one rounding of the result; float32 sums of some hundred products, whose terms are larger than their sum.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-4},
    torch.float16: {"rtol": 2**-10, "atol": 1e-3},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-3},
}


def random_weight(
    kind: str, outputs: int, inputs: int, group: int, seed: int, device: Place = "cpu"
) -> tuple[IntegerWeight, Tensor]:
    """A weight and its numbers in float64."""
    weight, exact = _random_weight(kind, outputs, inputs, group, seed)
    parts = {"integers": weight.integers, "scales": weight.scales, "minimums": weight.minimums}
    placed = {name: None if part is None else part.to(device) for name, part in parts.items()}
    return replace(weight, **placed), exact.to(device)


def _random_weight(kind: str, outputs: int, inputs: int, group: int, seed: int) -> tuple[IntegerWeight, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = (torch.rand(outputs, inputs // group, generator=generator) / 8).bfloat16()
    if kind == "int8":
        integers = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
        exact = integers.double().unflatten(1, (-1, group)) * scales.double()[..., None] / 16
        return pack_integers(integers, scales / 16, None), exact.flatten(1)
    integers = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, generator=generator)
    minimums = (-torch.rand(outputs, inputs // group, generator=generator)).bfloat16()
    exact = integers.double().unflatten(1, (-1, group)) * scales.double()[..., None] + minimums.double()[..., None]
    return pack_integers(integers, scales, minimums), exact.flatten(1)


def workspace(dtype: torch.dtype, weights: int = 1 << 16, device: Place = "cpu") -> LinearWorkspace:
    partials = poisoned(MAX_SPLITS * FEW_ROWS * 200, device=device)
    return LinearWorkspace(partials, poisoned(weights, dtype=dtype, device=device))


def check_product(
    rows: int, outputs: int, groups: int, kind: str, group: int, dtype: torch.dtype, seed: int, device: Place = "cpu"
) -> Tensor:
    """Returns the products."""
    inputs = groups * group
    weight, exact = random_weight(kind, outputs, inputs, group, seed, device)
    x = poisoned(rows, inputs + 3, dtype=dtype, device=device)  # rows are apart
    x[:, :inputs] = random_numbers(rows, inputs, seed=seed, device=device).to(dtype)
    memory = poisoned(rows + 2, outputs, dtype=dtype, device=device)
    linear(x[:, :inputs], weight, memory[:rows], workspace(dtype, device=device))
    expected = x[:, :inputs].double() @ exact.T
    tolerance = TOLERANCE[dtype]
    if rows > FEW_ROWS and dtype != torch.float32:  # the weights are rounded as well
        tolerance = {"rtol": tolerance["rtol"], "atol": 4 * tolerance["rtol"] * inputs**0.5}
    torch.testing.assert_close(memory[:rows].double(), expected, **tolerance)
    assert memory[rows:].isnan().all()
    return memory[:rows]
