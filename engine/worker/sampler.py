"""Sampling from logits for slots whose tokens the model backend can't choose (penalties, filters, logprobs, …).

Order: tokens excluded by the grammar, logit bias, tokens excluded by min_tokens, bad words and allowed tokens,
penalties, temperature, min_p, top_k and top_p, draw. A slot draws with one number, hashed from its seed and the number
of its output tokens. So its tokens do not depend on other slots, on chunks or on a preemption. A feature takes time
only for slots that use it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.arrays import Float32s, Float64s, Int32s, Int64s, UInt64s
from engine.columns import column, int32s
from engine.grammar import TokenMasks
from engine.logprob_columns import TokenLogprobs
from engine.messages import Sampling
from engine.model.runtime.vocab_shard import MIN_TEMPERATURE
from engine.worker.slots import WorkerSlots

BATCH_ROWS = 32  # rows of logits that are converted to float32 at a time: bounds the workspace
RUN = 256  # tokens whose weights are summed first when drawing
_FLOORS = (1e-2, 1e-4, 0.0)  # top_p looks at weights above a floor first; the greedy token weighs 1

_EXCLUDED = torch.tensor(-torch.inf)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Sampled:
    """tokens: int64[slots]."""

    tokens: Int64s
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class _Logprobs:
    """Those of one slot, the sampled token first."""

    at: int
    ids: list[int]
    values: list[float]
    rank: int


def uniform(seeds: UInt64s, counts: NDArray[np.integer]) -> Float64s:
    """Numbers in [0, 1), each hashed from a 64-bit seed and a counter."""
    mixed = _mix(_mix(seeds) + (counts.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: UInt64s) -> UInt64s:
    """The finalizer of splitmix64."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def sample(logits: Tensor, slots: WorkerSlots, which: Int64s, masks: TokenMasks | None = None) -> Sampled:
    """Sample one token for each of the slots `which` from logits [len(which), vocabulary]. Changes no state.

    `masks` are those of the step's grammars.
    """
    tokens: list[NDArray[np.int64]] = []
    logprobs: list[_Logprobs] = []
    for start in range(0, len(which), BATCH_ROWS):
        chosen = which[start : start + BATCH_ROWS].tolist()
        params = [slots.sampling[slot] for slot in chosen]
        part = logits[start : start + BATCH_ROWS].float()
        with_logprobs = [i for i, p in enumerate(params) if p.logprobs >= 0]
        raw = torch.log_softmax(part[with_logprobs], -1) if with_logprobs else None
        accepted = [None if masks is None else masks.accepted(slot, part.shape[1]) for slot in chosen]
        part = _adjust(part, logits.dtype == torch.float32, params, slots, chosen, accepted)
        found = part.numpy().argmax(-1)
        # A row of NaN or infinity, e.g. from a far too strong adapter, has no weights to draw by.
        finite = np.isfinite(np.take_along_axis(part.numpy(), found[:, None], 1)[:, 0])
        drawn = [i for i, p in enumerate(params) if p.temperature > 0 and finite[i]]
        if drawn:
            of = which[start : start + BATCH_ROWS][drawn]
            uniforms = uniform(slots.seed[of], slots.num_tokens[of] - slots.num_prompt_tokens[of])
            subset = part if len(drawn) == len(chosen) else part[drawn]
            found[drawn] = draw(subset, [params[i] for i in drawn], uniforms)
        for i, at in enumerate(with_logprobs):
            assert raw is not None
            logprobs.append(_row_logprobs(raw[i], start + at, int(found[at]), params[at].logprobs))
        tokens.append(found)
    return Sampled(np.concatenate(tokens), _pack(logprobs) if logprobs else None)


def _adjust(
    logits: Tensor,
    shared: bool,
    params: list[Sampling],
    slots: WorkerSlots,
    chosen: list[int],
    accepted: list[NDArray[np.bool_] | None],
) -> Tensor:
    """Apply bias, excluded tokens and penalties. With `shared` the tensor belongs to the model and is copied first."""
    touched = [i for i, p in enumerate(params) if p.adjusts_logits or accepted[i] is not None]
    if not touched:
        return logits
    if any(mask is not None for mask in accepted):
        logits = _masked(logits, accepted)
    elif shared:
        logits = logits.clone()
    for i in touched:
        p, slot = params[i], chosen[i]
        line = logits[i]
        output = slots.output_tokens(slot)
        if p.logit_bias:
            ids = torch.tensor([token for token, _ in p.logit_bias if token < len(line)])
            bias = torch.tensor([value for token, value in p.logit_bias if token < len(line)])
            line[ids] += bias
        if p.bad_words or p.allowed or (p.stop_ids and len(output) < p.min_tokens):
            _exclude(line, p, output)
        if p.repetition_penalty != 1.0:
            known = np.unique(slots.known_tokens(slot))
            ids = torch.from_numpy(known[known < len(line)].astype(np.int64))  # some stand for inputs only
            old = line[ids]
            line[ids] = torch.where(old > 0, old / p.repetition_penalty, old * p.repetition_penalty)
        if (p.presence_penalty or p.frequency_penalty) and len(output):
            seen, counts = np.unique(output, return_counts=True)
            penalty = p.presence_penalty + p.frequency_penalty * counts
            line[torch.from_numpy(seen.astype(np.int64))] -= torch.from_numpy(penalty.astype(np.float32))
    return logits


def _masked(logits: Tensor, accepted: list[NDArray[np.bool_] | None]) -> Tensor:
    """A copy without the tokens that grammars exclude; in one pass, which takes half the time of two."""
    copy = torch.empty_like(logits)
    for line, mask, to in zip(logits, accepted, copy, strict=True):
        if mask is None:
            to.copy_(line)
        else:
            torch.where(torch.from_numpy(mask), line, _EXCLUDED, out=to)
    return copy


def _exclude(line: Tensor, p: Sampling, output: Int32s) -> None:
    """Exclude stop ids before min_tokens, tokens that complete a bad word, and tokens that are not allowed.

    If no token would be left, min_tokens is ignored, then bad words are, and with a grammar the allowed tokens too.
    """
    stops = [token for token in p.stop_ids if token < len(line)] if len(output) < p.min_tokens else []
    ends = [word[-1] for word in p.bad_words if len(word) == 1 or word[:-1] == tuple(output[1 - len(word) :].tolist())]
    ends = [token for token in ends if token < len(line)]
    others = None
    if p.allowed:
        others = torch.ones(len(line), dtype=torch.bool)
        others[torch.from_numpy(int32s(p.allowed).astype(np.int64))] = False
    for excluded in (stops + ends, ends, []):
        left = line.clone()
        left[torch.tensor(excluded, dtype=torch.int64)] = -torch.inf
        if others is not None:
            left[others] = -torch.inf
        if left.amax() != -torch.inf:  # NaN counts as left
            line.copy_(left)
            return


def draw(logits: Tensor, params: list[Sampling], uniforms: Float64s) -> Int64s:
    """Draw one token per row from float32 logits [rows, vocabulary].

    min_p, top_k and top_p each become a minimum weight, where the greedy token weighs 1. Tokens that tie with the last
    one above it are kept too, so the order of equals does not matter.
    """
    weights = weigh(logits, np.array([p.temperature for p in params], dtype=np.float32))
    minimums = _minimum_weights(weights, params)
    if minimums is not None:
        weights.masked_fill_(weights < minimums[:, None], 0.0)
    return pick(weights, uniforms)


def weigh(logits: Tensor, temperatures: Float32s) -> Tensor:
    """exp((logit - highest) / temperature): each token's probability relative to that of the greedy one."""
    temperature = torch.from_numpy(temperatures)[:, None].clamp(min=MIN_TEMPERATURE)
    return ((logits - logits.amax(-1, keepdim=True)) / temperature).exp_()


def pick(weights: Tensor, uniforms: Float64s) -> Int64s:
    """Draw one token per row from weights [rows, vocabulary], by inverse CDF over the token ids.

    First the run of RUN tokens is found, then the token in it. E.g. with runs that weigh 1, 2, 1 and the number 0.5 the
    target is 2.0: it lies in the second run, at 1.0 of its 2.
    """
    rows, vocab = weights.shape
    weights = torch.nn.functional.pad(weights, (0, -vocab % RUN))
    runs = weights.view(rows, -1, RUN)
    edges = runs.sum(-1).numpy().astype(np.float64).cumsum(-1)
    targets = uniforms * edges[:, -1]
    run = np.minimum((edges <= targets[:, None]).sum(-1), edges.shape[1] - 1)
    before = np.where(run > 0, edges[np.arange(rows), run - 1], 0.0)
    inside = runs[torch.arange(rows), torch.from_numpy(run)].numpy()
    offset = (inside.astype(np.float64).cumsum(-1) <= (targets - before)[:, None]).sum(-1)
    last = RUN - 1 - (inside[:, ::-1] > 0).argmax(-1)  # rounding must not lead past the last token with a weight
    return run * RUN + np.minimum(offset, last)


def _minimum_weights(weights: Tensor, params: list[Sampling]) -> Tensor | None:
    """The minimum weight of each row's tokens, or None if no row has a filter."""
    vocab = weights.shape[1]
    minimums = torch.tensor([p.min_p for p in params])
    limited = [i for i, p in enumerate(params) if 0 < p.top_k < vocab or p.top_p < 1]
    if not limited and not any(p.min_p > 0 for p in params):
        return None
    for i in limited:
        minimums[i] = max(float(minimums[i]), _minimum_weight(weights[i].numpy(), float(minimums[i]), params[i]))
    return minimums


def _minimum_weight(weights: Float32s, minimum: float, params: Sampling) -> float:
    """The lowest weight that top_k and top_p keep in one row, after min_p."""
    vocab = len(weights)
    if 0 < params.top_k < vocab:
        weights = np.partition(weights, vocab - params.top_k)[vocab - params.top_k :]
    values = weights[weights >= minimum]
    if params.top_p >= 1:
        return float(values.min())
    wanted = params.top_p * values.sum(dtype=np.float64)
    for floor in _FLOORS:  # finds the few tokens that matter without sorting the rest
        likely = np.sort(values[values >= floor])[::-1]  # numpy sorts float32 much faster than torch does
        reached = likely.cumsum(dtype=np.float64)
        if reached[-1] > wanted:
            break
    kept = int((reached - likely < wanted).sum())
    return float(likely[max(kept, 1) - 1])


def _row_logprobs(raw: Tensor, at: int, token: int, count: int) -> _Logprobs:
    value = raw[token]
    ids, values = [token], [float(value)]
    if count:
        top = torch.topk(raw, min(count, len(raw)))
        ids += top.indices.tolist()
        values += top.values.tolist()
    return _Logprobs(at, ids, values, int((raw > value).sum()) + 1)


def _pack(rows: list[_Logprobs]) -> TokenLogprobs:
    width = max(len(row.ids) for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int32)
    values = np.full((len(rows), width), -np.inf, dtype=np.float32)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = row.ids
        values[i, : len(row.values)] = row.values
    at, ranks = column([row.at for row in rows]), column([row.rank for row in rows])
    return TokenLogprobs(width, at, column(ids), column(values, "<f4"), ranks)
