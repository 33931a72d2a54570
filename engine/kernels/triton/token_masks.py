"""Excludes tokens from the choice, by masks with a bit for each token."""

import triton
import triton.language as tl
from torch import Tensor

from engine.grammar import WORD_BITS
from engine.kernels.triton.launch import check_device

WORDS = 32  # words of a mask that a program reads


@triton.jit
def exclude_kernel(logits, rows, words, stride, vocabulary, width, WORDS: tl.constexpr, BITS: tl.constexpr):
    mask, part = tl.program_id(0), tl.program_id(1)
    word = part * WORDS + tl.arange(0, WORDS)
    bits = tl.load(words + mask.to(tl.int64) * width + word, mask=word < width, other=0)
    bit = tl.arange(0, BITS)
    token = word[:, None] * BITS + bit[None, :]
    excluded = ((bits[:, None] >> bit[None, :]) & 1) == 0
    to = logits + tl.load(rows + mask).to(tl.int64) * stride + token
    nothing = tl.full([WORDS, BITS], -float("inf"), tl.float32).to(logits.dtype.element_ty)
    tl.store(to, nothing, mask=excluded & (token < vocabulary))


def exclude_tokens(logits: Tensor, rows: Tensor, words: Tensor) -> None:
    """Set the logits of the tokens whose bits are not set to -inf, in place; see `engine.kernels.token_masks`.

    Args:
        logits: [n, vocabulary]; rows may be apart.
        rows: int32[m], different rows of the logits.
        words: int32[m, words]: words that are missing exclude their tokens.
    """
    check_device(logits, rows, words)
    if logits.stride(1) != 1 or not words.is_contiguous():
        raise ValueError("the logits of a row, and the masks, must be contiguous")
    masks, width = words.shape
    vocabulary = logits.shape[1]
    if masks:
        grid = (masks, triton.cdiv(vocabulary, WORDS * WORD_BITS))
        exclude_kernel[grid](logits, rows, words, logits.stride(0), vocabulary, width, WORDS=WORDS, BITS=WORD_BITS)
