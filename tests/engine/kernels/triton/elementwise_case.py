"""Random cases of elementwise kernels on a device, checked against float64; each returns what the kernel wrote."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from engine.kernels.triton.activation import gelu_tanh_mul, silu_mul
from engine.kernels.triton.mm_embeddings import merge_embeddings
from engine.kernels.triton.norm import rms_norm
from tests.engine.kernels.triton.numbers import TOLERANCE, poisoned, random_numbers

Place = torch.device | str
EPSILON = 1e-5
GATED: dict[Callable[[Tensor, Tensor], None], Callable[[Tensor], Tensor]] = {
    silu_mul: torch.nn.functional.silu,
    gelu_tanh_mul: lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def normalized(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    x = x.double()
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPSILON) * (weight.double() + offset)


def check_norm(
    tokens: int, hidden: int, has_delta: bool, offset: float, dtype: torch.dtype, seed: int, device: Place = "cpu"
) -> tuple[Tensor, ...]:
    residual = random_numbers(tokens, hidden, seed=seed, device=device)
    delta = random_numbers(tokens, hidden, seed=seed + 1, device=device).to(dtype)
    weight = random_numbers(hidden, seed=seed + 2, device=device).to(dtype)
    total = residual + delta.float() if has_delta else residual.clone()
    memory = poisoned(tokens + 3, hidden, dtype=dtype, device=device)
    rms_norm(residual, delta if has_delta else None, weight, memory[:tokens], EPSILON, offset)
    torch.testing.assert_close(residual, total, rtol=0, atol=0)
    torch.testing.assert_close(memory[:tokens].double(), normalized(total, weight, offset), **TOLERANCE[dtype])
    assert memory[tokens:].isnan().all(), "nothing is written behind the tokens"
    return residual, memory[:tokens]


def check_gated(
    kernel: Callable[[Tensor, Tensor], None], tokens: int, n: int, dtype: torch.dtype, seed: int, device: Place = "cpu"
) -> tuple[Tensor, ...]:
    gate_up = random_numbers(tokens, 2 * n, seed=seed, scale=4, device=device).to(dtype)
    memory = poisoned(tokens + 2, n, dtype=dtype, device=device)
    kernel(gate_up, memory[:tokens])
    gate, up = gate_up.double().chunk(2, 1)
    tolerance = TOLERANCE[dtype] | {"atol": 1e-5}
    torch.testing.assert_close(memory[:tokens].double(), GATED[kernel](gate) * up, **tolerance)
    assert memory[tokens:].isnan().all()
    return (memory[:tokens],)


def check_embeddings(
    tokens: int, hidden: int, rows: int, dtype: torch.dtype, seed: int, device: Place = "cpu"
) -> tuple[Tensor, ...]:
    rng = np.random.default_rng(seed)
    sources = rng.integers(-1, rows, tokens).astype(np.int32)
    memory = poisoned(tokens + 2, hidden, dtype=dtype, device=device)
    memory[:tokens] = random_numbers(tokens, hidden, seed=seed, device=device).to(dtype)
    expected = memory.clone()
    cache = poisoned(rows + 1, hidden + 8, dtype=dtype, device=device)  # unread rows and columns hold garbage
    used = torch.from_numpy(sources[sources >= 0]).long().to(device)
    cache[used, :hidden] = random_numbers(rows + 1, hidden, seed=seed + 1, device=device)[used].to(dtype)
    replaced = torch.from_numpy(np.flatnonzero(sources >= 0)).to(device)
    expected[replaced] = cache[used, :hidden]
    merge_embeddings(memory[:tokens], cache[:, :hidden], torch.from_numpy(sources).to(device))
    torch.testing.assert_close(memory, expected, rtol=0, atol=0, equal_nan=True)
    return (memory[:tokens],)
