"""Gated activations: the activation of the gate times up."""

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.launch import check_device, next_power_of_2, tokens_per_program

MAX_WIDTH = 1024  # columns of a program


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _gelu_tanh(x):
    # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), with u = sqrt(2 / pi) (x + 0.044715 x^3)
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit(do_not_specialize=["tokens"])
def gated_kernel(gate_up, out, tokens, N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, GELU: tl.constexpr):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    valid = (token < tokens)[:, None] & (i < N)[None, :]
    row = token.to(tl.int64)[:, None]
    gate = tl.load(gate_up + row * (2 * N) + i[None, :], mask=valid, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * N) + N + i[None, :], mask=valid, other=0.0).to(tl.float32)
    activated = _gelu_tanh(gate) if GELU else _silu(gate)
    tl.store(out + row * N + i[None, :], (activated * up).to(out.dtype.element_ty), mask=valid)


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """Write silu(gate) * up to `out` [tokens, n]; `gate_up` [tokens, 2 n] has the gate in its first n columns."""
    _launch(gate_up, out, gelu=False)


def gelu_tanh_mul(gate_up: Tensor, out: Tensor) -> None:
    """Write gelu(gate) * up, with the tanh approximation, to `out` [tokens, n]; `gate_up` as for `silu_mul`."""
    _launch(gate_up, out, gelu=True)


def _launch(gate_up: Tensor, out: Tensor, gelu: bool) -> None:
    check_device(gate_up, out)
    tokens, n = out.shape
    if gate_up.shape != (tokens, 2 * n):
        raise ValueError(f"gate and up have shape {tuple(gate_up.shape)}, not {(tokens, 2 * n)}")
    if not tokens:
        return
    width, rows = min(MAX_WIDTH, next_power_of_2(n)), tokens_per_program(1)
    grid = (triton.cdiv(tokens, rows), triton.cdiv(n, width))
    gated_kernel[grid](gate_up, out, tokens, N=n, WIDTH=width, ROWS=rows, GELU=gelu)
