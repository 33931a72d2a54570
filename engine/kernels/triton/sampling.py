"""Chooses the next token of each row on the device: greedy, or drawn at a temperature, with top_k, top_p and min_p.

The rules are those of `engine.worker.sampler`: a token's weight is exp((logit - highest) / temperature); filters become
a minimum weight, and tokens that tie with the last one above it are kept; a row draws with one number, hashed from its
seed and the number of its output tokens, by inverse CDF over the token ids. So a row's token does not depend on other
rows, and equals the CPU's but for rounding.

Kernels, with the vocabulary in runs of RUN tokens:

    runs_kernel      [rows, runs]  highest logit of each run, its token, and the weight of the run relative to it
    minimum_kernel   [rows]        minimum weight of filtered rows, see `engine.kernels.triton.minimum_weight`
    filter_kernel    [rows, runs]  weight of each run without the tokens below the minimum
    pick_kernel      [rows]        the run in which the number falls, then the token in the run; 0 for rows whose run
                                   another rank has, see `engine.kernels.triton.sampling_shards`

Without filters the second and third are not launched, and the logits are read once, and one run of them twice. The host
knows from its own copy of the parameters whether any row has filters; no kernel's result decides what is launched.
"""

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from engine.arrays import Float32s, Float64s, Int32s, UInt64s
from engine.kernels.triton.launch import check_device, next_power_of_2
from engine.kernels.triton.minimum_weight import PARAMETERS, find_minimums, load_row, load_word64, weigh

RUN = 1024  # tokens of a run

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)


@triton.jit
def _mix(x):
    """The finalizer of splitmix64, on uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def uniform(seed, count):
    """A number in [0, 1) in float64, of a uint64 seed and a counter; the bits of `engine.worker.sampler.uniform`."""
    mixed = _mix(_mix(seed) + (count.to(tl.uint64) + 1) * _GOLDEN)
    return (mixed >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2 ** -53


@triton.jit
def runs_kernel(logits, parameters, slots, tops, tokens, weights, stride, vocabulary, runs, RUN: tl.constexpr):
    row, run = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    if slot >= 0:
        token = run * RUN + tl.arange(0, RUN)
        x = tl.load(logits + row.to(tl.int64) * stride + token, mask=token < vocabulary, other=-float("inf"))
        x = x.to(tl.float32)
        # A NaN counts as infinity, so that it is found as the highest, and the row isn't drawn.
        x = tl.where(x == x, x, float("inf"))
        top, at = tl.max(x, 0, return_indices=True)
        temperature = load_row(parameters, slot)[0]
        base = tl.where(top > -float("inf"), top, 0.0)
        to = row.to(tl.int64) * runs + run
        tl.store(tops + to, top)
        tl.store(tokens + to, run * RUN + at)
        tl.store(weights + to, tl.sum(weigh(x, base, temperature), 0))


@triton.jit
def filter_kernel(logits, parameters, slots, tops, minimums, weights, stride, vocabulary, runs, RUN: tl.constexpr):
    row, run = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    if slot >= 0:
        minimum, best = tl.load(minimums + row * 2), tl.load(minimums + row * 2 + 1)
        if minimum > 0.0:
            temperature = load_row(parameters, slot)[0]
            to = row.to(tl.int64) * runs + run
            total = 0.0
            if weigh(tl.load(tops + to), best, temperature) >= minimum:
                token = run * RUN + tl.arange(0, RUN)
                x = tl.load(logits + row.to(tl.int64) * stride + token, mask=token < vocabulary, other=-float("inf"))
                weight = weigh(x.to(tl.float32), best, temperature)
                total = tl.sum(tl.where(weight >= minimum, weight, 0.0), 0)
            tl.store(weights + to, total)


@triton.jit
def pick_kernel(
    logits, parameters, slots, counts, tops, tokens, weights, minimums, out, stride, vocabulary, runs,
    first_run, own_runs, first_token,
    FILTERED: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    if slot >= 0:
        j = tl.arange(0, RUNS)
        at = row.to(tl.int64) * runs + j
        top = tl.load(tops + at, mask=j < runs, other=-float("inf"))
        best, best_run = tl.max(top, 0, return_indices=True)
        temperature = load_row(parameters, slot)[0]
        if (temperature > 0.0) & (best > -float("inf")) & (best < float("inf")):
            minimum = 0.0
            if FILTERED:
                minimum = tl.load(minimums + row * 2)
            weight = tl.load(weights + at, mask=j < runs, other=0.0)
            if minimum <= 0.0:  # else they are relative to the highest logit of the row already
                weight = weight * weigh(top, best, temperature)
            edges = tl.cumsum(weight.to(tl.float64), 0)
            number = uniform(load_word64(parameters, slot, 4), tl.load(counts + row))
            target = number * tl.max(edges, 0)
            # Rounding must not lead past the last run, and below past the last token, with a weight.
            last = tl.max(tl.where(weight > 0.0, j, 0), 0)
            run = tl.minimum(tl.sum((edges <= target).to(tl.int32), 0), last)
            before = tl.sum(tl.where(j == run - 1, edges, 0.0), 0)
            i = tl.arange(0, RUN)
            own = run - first_run
            is_own = (own >= 0) & (own < own_runs)
            token = own * RUN + i
            x = tl.load(
                logits + row.to(tl.int64) * stride + token, mask=is_own & (token < vocabulary), other=-float("inf")
            )
            inside = weigh(x.to(tl.float32), best, temperature)
            inside = tl.where(inside >= minimum, inside, 0.0)
            passed = tl.cumsum(inside.to(tl.float64), 0) <= target - before
            last = tl.max(tl.where(inside > 0.0, i, 0), 0)
            chosen = own * RUN + tl.minimum(tl.sum(passed.to(tl.int32), 0), last)
        else:
            own = best_run - first_run
            is_own = (own >= 0) & (own < own_runs)
            chosen = tl.load(tokens + row.to(tl.int64) * runs + best_run)
        tl.store(out + row, tl.where(is_own, first_token + chosen, 0))


@dataclass(frozen=True, slots=True)
class SamplingWorkspace:
    """Memory between the kernels, for at most `rows` rows; allocated once, so that a captured graph can use it."""

    tops: Tensor  # float32[rows, runs]
    tokens: Tensor  # int32[rows, runs]
    weights: Tensor  # float32[rows, runs]
    minimums: Tensor  # float32[rows, 2]: minimum weight, highest logit

    @classmethod
    def allocate(cls, rows: int, vocabulary: int, device: torch.device | str) -> "SamplingWorkspace":
        runs = triton.cdiv(vocabulary, RUN)
        floats = [torch.empty(rows, width, dtype=torch.float32, device=device) for width in (runs, runs, 2)]
        return cls(floats[0], torch.empty(rows, runs, dtype=torch.int32, device=device), floats[1], floats[2])


def pack_parameters(
    temperature: Float32s, top_k: NDArray[np.integer], top_p: Float64s, min_p: Float32s, seed: UInt64s
) -> Int32s:
    """Sampling parameters of n slots as rows of the device's table, int32[n, PARAMETERS]; on the host.

    Words: 0 temperature, 1 min_p (both float32), 2 top_k, 3 unused, 4 and 5 seed, 6 and 7 top_p (float64).
    """
    packed = np.zeros((len(seed), PARAMETERS), dtype=np.int32)
    packed[:, 0] = np.asarray(temperature, dtype=np.float32).view(np.int32)
    packed[:, 1] = np.asarray(min_p, dtype=np.float32).view(np.int32)
    packed[:, 2] = top_k
    packed[:, 4:6] = np.ascontiguousarray(seed, dtype=np.uint64).view(np.int32).reshape(-1, 2)
    packed[:, 6:8] = np.ascontiguousarray(top_p, dtype=np.float64).view(np.int32).reshape(-1, 2)
    return packed


def choose_tokens(
    logits: Tensor,
    parameters: Tensor,
    slots: Tensor,
    counts: Tensor,
    out: Tensor,
    workspace: SamplingWorkspace,
    filtered: bool,
) -> None:
    """Choose one token for each row of the logits.

    Rows with a NaN or an infinite logit get the first of these, as on the CPU.

    Args:
        logits: [rows, vocabulary]; rows may be apart. Not changed.
        parameters: int32[slots, PARAMETERS], see `pack_parameters`.
        slots: int32[rows], the slot of each row; -1: padding, whose `out` isn't written.
        counts: int32[rows], output tokens before the one to choose.
        out: int32[rows].
        workspace: for at least as many rows.
        filtered: whether any row may have top_k, top_p or min_p; if false, they are ignored.
    """
    tables = (workspace.tops, workspace.tokens, workspace.weights, workspace.minimums)
    check_device(logits, parameters, slots, counts, out, *tables)
    rows, vocabulary = logits.shape
    if not rows:
        return
    runs, stride = triton.cdiv(vocabulary, RUN), logits.stride(0)
    _check(logits, parameters, workspace, runs)
    tops, tokens, weights, minimums = tables
    grid, sizes = (rows, runs), (stride, vocabulary, runs)
    runs_kernel[grid](logits, parameters, slots, tops, tokens, weights, *sizes, RUN=RUN)
    if filtered:
        find_minimums(logits, parameters, slots, tops, minimums, RUN)
        filter_kernel[grid](logits, parameters, slots, tops, minimums, weights, *sizes, RUN=RUN)
    width = next_power_of_2(runs)
    pick_kernel[(rows,)](
        logits, parameters, slots, counts, tops, tokens, weights, minimums, out, *sizes, 0, runs, 0,
        FILTERED=filtered, RUNS=width, RUN=RUN,
    )  # fmt: skip


def _check(logits: Tensor, parameters: Tensor, workspace: SamplingWorkspace, runs: int) -> None:
    if logits.stride(1) != 1:
        raise ValueError("the logits of a row must be contiguous")
    if parameters.shape[1] != PARAMETERS or not parameters.is_contiguous():
        raise ValueError(f"sampling parameters must be contiguous rows of {PARAMETERS} words")
    if workspace.tops.shape[0] < len(logits) or workspace.tops.shape[1] != runs:
        raise ValueError(
            f"the workspace is for {workspace.tops.shape[0]} rows of {workspace.tops.shape[1]} runs, "
            f"not for {len(logits)} of {runs}"
        )
