"""Chooses tokens where ranks divide the vocabulary, without gathering logits.

Each rank sums up the runs of its own tokens (see `engine.kernels.triton.sampling`). The ranks gather these sums, which
take 12 bytes where a run of logits in bfloat16 takes 2 KiB. All find the same run of the whole vocabulary; the rank
that has it chooses the token, the others answer 0, and the sum over ranks is the token. Numbers fall into runs in the
order of the token ids, so a seed gives the token that one rank gives, but for rounding.
"""

import torch
import triton
from torch import Tensor

from engine.kernels.triton.launch import check_device, next_power_of_2
from engine.kernels.triton.sampling import RUN, pick_kernel, runs_kernel


def runs_of(tokens: int) -> int:
    """Runs of a rank that has so many tokens."""
    return int(triton.cdiv(tokens, RUN))


def sum_runs(logits: Tensor, parameters: Tensor, slots: Tensor, sums: Tensor) -> None:
    """Write highest logit, its token, and weight of each run of a rank's logits.

    Args:
        logits: [rows, tokens of the rank]; rows may be apart.
        parameters, slots: as of `engine.kernels.triton.sampling.choose_tokens`.
        sums: int32[3, rows, runs]; the first and the last are float32. All ranks have as many runs; empty ones weigh 0.
    """
    check_device(logits, parameters, slots, sums)
    rows, runs = sums.shape[1:]
    if rows:
        tops, tokens, weights = _tables(sums)
        sizes = (logits.stride(0), logits.shape[1], runs)
        runs_kernel[(rows, runs)](logits, parameters, slots, tops, tokens, weights, *sizes, RUN=RUN)


def choose_own(
    logits: Tensor,
    parameters: Tensor,
    slots: Tensor,
    counts: Tensor,
    sums: Tensor,
    own_runs: tuple[int, int],
    first: int,
    out: Tensor,
) -> None:
    """Choose the tokens of rows whose run this rank has; other rows get 0. Filters are ignored.

    Args:
        logits, parameters, slots, counts: as of `sum_runs` and `choose_tokens`.
        sums: of all ranks, side by side: int32[3, rows, ranks * runs].
        own_runs: the first run of this rank, and how many it has.
        first: its first token.
        out: int32[rows].
    """
    check_device(logits, parameters, slots, counts, sums, out)
    rows, runs = sums.shape[1:]
    if rows:
        tops, tokens, weights = _tables(sums)
        pick_kernel[(rows,)](
            logits, parameters, slots, counts, tops, tokens, weights, weights, out,
            logits.stride(0), logits.shape[1], runs, *own_runs, first,
            FILTERED=False, RUNS=next_power_of_2(runs), RUN=RUN,
        )  # fmt: skip


def _tables(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not sums.is_contiguous():
        raise ValueError("the sums of runs must be contiguous")
    return sums[0].view(torch.float32), sums[1], sums[2].view(torch.float32)
