"""Random numbers, poisoned memory and tolerances for the tests of kernels."""

import math

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of one rounding to the storage dtype. The interpreter cuts bfloat16 off instead of rounding it: twice the error.
TOLERANCE = {
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
    torch.float16: {"rtol": 2**-10, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6},
}


def random_numbers(*shape: int, seed: int, scale: float = 1.0, device: torch.device | str = "cpu") -> Tensor:
    """Normally distributed float32, the same on all devices."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Memory that nothing has been written to: NaN, or numbers far outside any valid range."""
    return torch.full(shape, math.nan if dtype.is_floating_point else -(2**30), dtype=dtype, device=device)
