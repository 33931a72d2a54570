"""RMSNorm of the residual, after the last sublayer's output is added to it."""

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.launch import check_device, next_power_of_2, tokens_per_program

MAX_WARPS = 16
WIDTH_PER_WARP = 512  # 16 numbers of a token in each thread


@triton.jit(do_not_specialize=["tokens"])
def rms_norm_kernel(
    residual, delta, weight, out, epsilon, offset, tokens,
    HAS_DELTA: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, WIDTH)
    at = token.to(tl.int64)[:, None] * HIDDEN + i[None, :]
    valid = (token < tokens)[:, None] & (i < HIDDEN)[None, :]
    x = tl.load(residual + at, mask=valid, other=0.0).to(tl.float32)
    if HAS_DELTA:
        x += tl.load(delta + at, mask=valid, other=0.0).to(tl.float32)
        tl.store(residual + at, x.to(residual.dtype.element_ty), mask=valid)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / HIDDEN + epsilon)
    w = tl.load(weight + i, mask=i < HIDDEN, other=0.0).to(tl.float32) + offset
    tl.store(out + at, (x * scale[:, None] * w[None, :]).to(out.dtype.element_ty), mask=valid)


def rms_norm(
    residual: Tensor, delta: Tensor | None, weight: Tensor, out: Tensor, epsilon: float, offset: float = 0.0
) -> None:
    """Add `delta` to the residual in place, and write residual / rms(residual) * (weight + offset) to `out`.

    Args:
        residual: float32[tokens, hidden]. Other dtypes are rounded after the sum; the norm is that of the exact sum.
        delta: [tokens, hidden], the last sublayer's output; None: nothing is added, and the residual isn't written.
        weight: [hidden].
        out: [tokens, hidden], in the dtype of the next product.
        epsilon: added to the mean square.
        offset: 1 for families that store weight - 1 (Gemma).
    """
    check_device(residual, delta, weight, out)
    tokens, hidden = residual.shape
    if not tokens:
        return
    width, rows = next_power_of_2(hidden), tokens_per_program(1)
    rms_norm_kernel[(triton.cdiv(tokens, rows),)](
        residual, residual if delta is None else delta, weight, out, epsilon, offset, tokens,
        HAS_DELTA=delta is not None, HIDDEN=hidden, WIDTH=width, ROWS=rows,
        num_warps=min(MAX_WARPS, max(1, width // WIDTH_PER_WARP)),
    )  # fmt: skip
