"""Merges the outputs of encoders (images, audio, video) into the hidden states, at their placeholder tokens."""

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.launch import check_device, next_power_of_2, tokens_per_program

MAX_WIDTH = 2048  # columns of a program


@triton.jit(do_not_specialize=["tokens"])
def merge_kernel(
    hidden, embeddings, sources, stride, tokens, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    source = tl.load(sources + token, mask=token < tokens, other=-1)
    valid = (source >= 0)[:, None] & (i < HIDDEN)[None, :]
    x = tl.load(embeddings + source.to(tl.int64)[:, None] * stride + i[None, :], mask=valid, other=0.0)
    at = token.to(tl.int64)[:, None] * HIDDEN + i[None, :]
    tl.store(hidden + at, x.to(tl.float32).to(hidden.dtype.element_ty), mask=valid)


def merge_embeddings(hidden: Tensor, embeddings: Tensor, sources: Tensor) -> None:
    """Replace the hidden states of placeholder tokens by embeddings.

    Args:
        hidden: [tokens, hidden], the embedded tokens; changed in place.
        embeddings: [rows, hidden], outputs of encoders; its rows may be a view of something wider.
        sources: int32[tokens], the row in `embeddings` of each placeholder; -1 for all other and for padded tokens.
    """
    check_device(hidden, embeddings, sources)
    tokens, size = hidden.shape
    if not tokens:
        return
    width, rows = min(MAX_WIDTH, next_power_of_2(size)), tokens_per_program(1)
    grid = (triton.cdiv(tokens, rows), triton.cdiv(size, width))
    merge_kernel[grid](hidden, embeddings, sources, embeddings.stride(0), tokens, HIDDEN=size, WIDTH=width, ROWS=rows)
