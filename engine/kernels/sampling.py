"""Torch implementation of sampling on a device, for devices without Triton.

It gives the same tokens as `engine.worker.sampler` for the same logits: by the same hashed numbers and order of
filters. Where the host computes in float64, so does this, on devices that have it.
"""

import functools
import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.arrays import Int32s
from engine.messages import Sampling

PARAMETERS = 8  # words of a slot's parameters, see `pack_parameters`
RUN = 256  # tokens whose weights are summed first when drawing
WITHOUT_FLOAT64 = ("mps", "hpu")  # types of devices
MIN_TEMPERATURE = 1e-6  # below it sampling in float32 equals greedy


@dataclass(frozen=True, slots=True)
class Draws:
    """What the rows of a step need, as the host knows it. It saves work and changes no token."""

    any_drawn: bool  # a row has a temperature above 0
    any_filtered: bool  # of those, a row has a top-k, top-p or min-p


def pack_parameters(sampling: Sampling) -> Int32s:
    """A slot's parameters as the device keeps them, int32[PARAMETERS]; the same as for the kernels in Triton.

    Words: 0 temperature, 1 min_p, 3 top_p (float32), 2 top_k, 4 and 5 seed, 6 and 7 top_p (float64).
    """
    top_k, top_p = min(sampling.top_k, 2**31 - 1), sampling.top_p
    packed = struct.pack("<ffifQd", sampling.temperature, sampling.min_p, top_k, top_p, sampling.seed, top_p)
    return np.frombuffer(packed, dtype=np.int32)


def choose_tokens(logits: Tensor, parameters: Tensor, slots: Tensor, counts: Tensor, draws: Draws) -> Tensor:
    """One token for each row: greedy, or drawn at its slot's temperature; int32[rows].

    Args:
        logits: [rows, vocabulary].
        parameters: int32[slots, PARAMETERS].
        slots: int32[rows], the slot of each row.
        counts: int32[rows], output tokens of the slot so far.
    """
    greedy = logits.argmax(-1)
    if not draws.any_drawn:
        return greedy.int()
    of = parameters[slots.long()]
    temperature = of[:, 0].view(torch.float32)
    weights = _weigh(logits.float(), temperature)
    if draws.any_filtered:
        minimums = _minimum_weights(weights, of[:, 1].view(torch.float32), of[:, 2], _top_p(of))
        weights = weights.masked_fill(weights < minimums[:, None], 0.0)
    drawn = _pick(weights, uniform(of[:, 4:6].view(torch.int64)[:, 0], counts, _wide(logits)))
    # A row of NaN or infinity has no weights to draw by.
    finite = logits.gather(-1, greedy[:, None])[:, 0].isfinite()
    return torch.where((temperature > 0) & finite, drawn, greedy).int()


def uniform(seeds: Tensor, counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in [0, 1), each hashed from a seed int64 and a counter, as `engine.worker.sampler.uniform`."""
    mixed = _mix(_mix(seeds) + (counts.long() + 1) * _signed(0x9E3779B97F4A7C15))
    return _shifted(mixed, 11).to(dtype) * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    """The finalizer of splitmix64, on signed numbers, whose products wrap around."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _signed(number: int) -> int:
    return number - (1 << 64)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x shifted to the right as if it were unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _wide(tensor: Tensor) -> torch.dtype:
    return widest_float(tensor.device)


@functools.cache
def widest_float(device: torch.device) -> torch.dtype:
    """float64 if the device computes in it. Metal and Gaudi do not, and some GPUs by Intel do not."""
    if device.type in WITHOUT_FLOAT64:
        return torch.float32
    try:
        torch.ones(1, dtype=torch.float64, device=device).add_(1)
    except (RuntimeError, TypeError):
        return torch.float32
    return torch.float64


def _top_p(parameters: Tensor) -> Tensor:
    """float32 or float64[rows], whichever products have."""
    wide = _wide(parameters) == torch.float64
    return parameters[:, 6:8].view(torch.float64)[:, 0] if wide else parameters[:, 3].view(torch.float32)


def _weigh(logits: Tensor, temperature: Tensor) -> Tensor:
    """exp((logit - highest) / temperature)."""
    temperature = temperature[:, None].clamp(min=MIN_TEMPERATURE)
    return ((logits - logits.amax(-1, keepdim=True)) / temperature).exp_()


def _minimum_weights(weights: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The lowest weight that the filters keep, in the order min_p, top_k, top_p: float32[rows].

    Args:
        weights: float32[rows, vocabulary]; the greedy token weighs 1.
        min_p: float32[rows]. top_p: [rows].
        top_k: int32[rows].
    """
    vocab = weights.shape[1]
    ordered = weights.sort(-1, descending=True).values
    rank = torch.arange(vocab, device=weights.device)
    limit = torch.where(top_k > 0, top_k, vocab)
    valid = (rank < limit[:, None]) & (ordered >= min_p[:, None])
    values = ordered.to(_wide(weights)).masked_fill(~valid, 0.0)
    reached = values.cumsum(-1)
    wanted = top_p[:, None] * reached[:, -1:]
    kept = valid & ((reached - values < wanted) | (top_p >= 1)[:, None])
    last = kept.sum(-1, keepdim=True).clamp(min=1) - 1
    filtered = (top_p < 1) | (limit < vocab)
    return torch.where(filtered, ordered.gather(-1, last)[:, 0], min_p)


def _pick(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token per row from weights [rows, vocabulary], by inverse CDF over the token ids: int64[rows].

    First the run of RUN tokens is found, then the token in it.
    """
    rows, vocab = weights.shape
    weights = torch.nn.functional.pad(weights, (0, -vocab % RUN))
    runs = weights.view(rows, -1, RUN)
    edges = runs.sum(-1).to(uniforms.dtype).cumsum(-1)
    targets = uniforms * edges[:, -1]
    run = (edges <= targets[:, None]).sum(-1, keepdim=True).clamp(max=edges.shape[1] - 1)
    before = torch.where(run > 0, edges.gather(-1, (run - 1).clamp(min=0)), 0.0)
    inside = runs.gather(1, run[..., None].expand(-1, -1, RUN))[:, 0]
    offset = (inside.to(uniforms.dtype).cumsum(-1) <= targets[:, None] - before).sum(-1)
    last = RUN - 1 - (inside.flip(-1) > 0).int().argmax(-1)  # rounding must not lead past the last token with a weight
    return run[:, 0] * RUN + torch.minimum(offset, last)
