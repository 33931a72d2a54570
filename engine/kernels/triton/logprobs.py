"""Logprobs of the chosen and of the likeliest tokens, and the chosen token's rank, from the model's logits.

As `engine.worker.sampler` and `engine.worker.prompt_logprobs` compute them, but among equal logits the lower token id
comes first. The likeliest tokens are taken one by one: the run with the highest logit left is read again to find its
next one, so a row reads the logits once and `top` runs of them twice.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.launch import check_device, next_power_of_2

RUN = 1024  # tokens of a run


@triton.jit
def _load_run(logits, run, vocabulary, RUN: tl.constexpr):
    """Tokens of a run, and their logits in float32. A NaN counts as infinity, so that it comes first."""
    token = run * RUN + tl.arange(0, RUN)
    x = tl.load(logits + token, mask=token < vocabulary, other=-float("inf")).to(tl.float32)
    return token, tl.where(x == x, x, float("inf"))


@triton.jit
def run_sums_kernel(
    logits, rows, tokens, tops, firsts, sums, greater, stride, vocabulary, runs, RUN: tl.constexpr
):  # fmt: skip
    """Of each run: its highest logit and the token, the sum of exp(logit - highest), and how many exceed the chosen."""
    i, run = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + i)
    if row >= 0:
        logits += row.to(tl.int64) * stride
        x = _load_run(logits, run, vocabulary, RUN)[1]
        top, at = tl.max(x, 0, return_indices=True)
        base = tl.where(top > -float("inf"), top, 0.0)
        chosen = tl.load(logits + tl.load(tokens + row)).to(tl.float32)
        to = i.to(tl.int64) * runs + run
        tl.store(tops + to, top)
        tl.store(firsts + to, run * RUN + at)
        tl.store(sums + to, tl.sum(tl.exp(x - base), 0))
        tl.store(greater + to, tl.sum((x > chosen).to(tl.int32), 0))


@triton.jit(do_not_specialize=["width"])
def logprobs_kernel(
    logits, rows, tokens, tops, firsts, sums, greater, ids, values, ranks, stride, vocabulary, runs, width,
    RUNS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    row = tl.load(rows + i)
    if row >= 0:
        logits += row.to(tl.int64) * stride
        j = tl.arange(0, RUNS)
        at = i.to(tl.int64) * runs + j
        top = tl.load(tops + at, mask=j < runs, other=-float("inf"))
        first = tl.load(firsts + at, mask=j < runs, other=0)
        highest = tl.max(top, 0)
        total = tl.sum(tl.load(sums + at, mask=j < runs, other=0.0) * tl.exp(top - highest), 0)
        log_total = tl.log(total)
        chosen = tl.load(tokens + row)
        rank = tl.sum(tl.load(greater + at, mask=j < runs, other=0), 0) + 1
        out = i.to(tl.int64) * width
        tl.store(ids + out, chosen)
        tl.store(values + out, tl.load(logits + chosen).to(tl.float32) - highest - log_total)
        tl.store(ranks + i, tl.where(log_total == log_total, rank, 1))
        left = j < runs  # runs with tokens that aren't taken
        for n in range(1, width):
            best = tl.max(tl.where(left, top, -float("inf")), 0)
            run = tl.min(tl.where(left & (top == best), j, RUNS), 0)
            token = tl.max(tl.where(j == run, first, 0), 0)
            tl.store(ids + out + n, token)
            tl.store(values + out + n, best - highest - log_total)
            others, x = _load_run(logits, tl.minimum(run, runs - 1), vocabulary, RUN)
            after = (others < vocabulary) & ((x < best) | ((x == best) & (others > token)))
            next_top = tl.max(tl.where(after, x, -float("inf")), 0)
            next_token = tl.min(tl.where(after & (x == next_top), others, vocabulary), 0)
            top = tl.where(j == run, next_top, top)
            first = tl.where(j == run, next_token, first)
            left = left & ((j != run) | (next_token < vocabulary))


@dataclass(frozen=True, slots=True)
class LogprobsWorkspace:
    """Memory between the kernels, for at most `rows` rows; allocated once, so that a captured graph can use it."""

    tops: Tensor  # float32[rows, runs]
    firsts: Tensor  # int32[rows, runs]
    sums: Tensor  # float32[rows, runs]
    greater: Tensor  # int32[rows, runs]

    @classmethod
    def allocate(cls, rows: int, vocabulary: int, device: torch.device | str) -> "LogprobsWorkspace":
        dtypes = (torch.float32, torch.int32) * 2
        return cls(*(torch.empty(rows, triton.cdiv(vocabulary, RUN), dtype=dtype, device=device) for dtype in dtypes))


def token_logprobs(
    logits: Tensor, rows: Tensor, tokens: Tensor, out: tuple[Tensor, Tensor, Tensor], workspace: LogprobsWorkspace
) -> None:
    """Compute the logprobs of n rows of the logits.

    Args:
        logits: [rows of the step, vocabulary]; rows may be apart.
        rows: int32[n], the rows that are wanted; -1: padding, for which nothing is written.
        tokens: int32[rows of the step], the chosen token of each row.
        out: ids int32[n, 1 + top] and values float32[n, 1 + top], the chosen token first, then the `top` likeliest,
            `top` being at most the vocabulary; ranks int32[n], 1 + the number of tokens with a higher logit.
        workspace: for at least n rows.

    Raises:
        ValueError: the shapes don't fit.
    """
    ids, values, ranks = out
    parts = (workspace.tops, workspace.firsts, workspace.sums, workspace.greater)
    check_device(logits, rows, tokens, ids, values, ranks, *parts)
    n, vocabulary, width = len(rows), logits.shape[1], ids.shape[1]
    runs = triton.cdiv(vocabulary, RUN)
    if ids.shape != values.shape or not (ids.is_contiguous() and values.is_contiguous()) or width > vocabulary + 1:
        raise ValueError(f"ids and values must be contiguous and alike, with at most {vocabulary + 1} columns")
    if workspace.tops.shape[0] < n or workspace.tops.shape[1] != runs or logits.stride(1) != 1:
        raise ValueError(f"the workspace is not for {n} rows of {runs} runs, or the logits of a row are not contiguous")
    if not n:
        return
    sizes = (logits.stride(0), vocabulary, runs)
    run_sums_kernel[(n, runs)](logits, rows, tokens, *parts, *sizes, RUN=RUN)
    logprobs_kernel[(n,)](
        logits, rows, tokens, *parts, ids, values, ranks, *sizes, width, RUNS=next_power_of_2(runs), RUN=RUN
    )
