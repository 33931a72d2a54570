"""The lowest weight that top_k, top_p and min_p keep in each row of logits.

Both limits are the largest weight v for which a sum over the tokens of weight v or more reaches a target: of ones for
top_k, of weights for top_p. The order of floats that aren't negative is that of their bits as integers, so v is found
by dividing an interval of bits in four, again and again: at most 15 passes over the row, and about half of that in
practice, since a pass also sees whether one value is left in the interval. Runs whose highest logit lies below the
interval are skipped. v is exact, so tokens that tie with it are kept, and sums are in a fixed order, so it is
deterministic. Sorting would take about (log2 n)^2 / 2 passes through shared memory that doesn't hold a vocabulary;
histograms of weights would take atomic additions of floats, whose order changes from run to run.
"""

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.launch import next_power_of_2

PARAMETERS = 8  # words of a slot's sampling parameters, see `engine.kernels.triton.sampling.pack_parameters`
TILE_RUNS = 4  # runs that are read at a time
WARPS = 16

_PARAMETERS = tl.constexpr(PARAMETERS)
_BITS_OF_ONE = tl.constexpr(0x3F800000)
_MIN_TEMPERATURE = tl.constexpr(1e-6)  # below it sampling in float32 equals greedy


@triton.jit
def weigh(x, best, temperature):
    """exp((x - best) / temperature), the same bits in each kernel: weights are compared with each other."""
    return tl.exp((x - best) / tl.maximum(temperature, _MIN_TEMPERATURE))


@triton.jit
def load_word64(parameters, slot, word):
    """Words `word` and `word` + 1 of a slot as uint64."""
    at = parameters + slot.to(tl.int64) * _PARAMETERS + word
    low = tl.load(at).to(tl.uint32, bitcast=True).to(tl.uint64)
    return low | (tl.load(at + 1).to(tl.uint32, bitcast=True).to(tl.uint64) << 32)


@triton.jit
def load_row(parameters, slot):
    """A slot's temperature, min_p, top_k, top_p."""
    at = parameters + slot.to(tl.int64) * _PARAMETERS
    temperature = tl.load(at).to(tl.float32, bitcast=True)
    min_p = tl.load(at + 1).to(tl.float32, bitcast=True)
    return temperature, min_p, tl.load(at + 2), load_word64(parameters, slot, 6).to(tl.float64, bitcast=True)


@triton.jit
def _highest_of_tile(tops, run, runs, TILE_RUNS: tl.constexpr):
    j = run + tl.arange(0, TILE_RUNS)
    return tl.max(tl.load(tops + j, mask=j < runs, other=-float("inf")), 0)


@triton.jit
def _load_weights(logits, run, best, temperature, vocabulary, TILE: tl.constexpr, RUN: tl.constexpr):
    token = run * RUN + tl.arange(0, TILE)
    x = tl.load(logits + token, mask=token < vocabulary, other=-float("inf")).to(tl.float32)
    return weigh(x, best, temperature)


@triton.jit
def _largest(
    logits, tops, best, temperature, low, target, vocabulary, runs,
    COUNT: tl.constexpr, TILE_RUNS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The bits of the largest weight v >= `low` (bits) such that the sum over weights >= v reaches the target."""
    TILE: tl.constexpr = TILE_RUNS * RUN
    high = low * 0 + (_BITS_OF_ONE + 1)  # no weight is that high
    while low + 1 < high:
        step = (high - low + 3) // 4
        first = (low + step).to(tl.float32, bitcast=True)
        second = tl.minimum(low + 2 * step, high).to(tl.float32, bitcast=True)
        third = tl.minimum(low + 3 * step, high).to(tl.float32, bitcast=True)
        lowest, end = low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)
        from_first = tl.zeros([TILE], tl.float32)
        from_second = tl.zeros([TILE], tl.float32)
        from_third = tl.zeros([TILE], tl.float32)
        least = tl.full([TILE], 2.0, tl.float32)  # of the weights in the interval
        most = tl.full([TILE], 0.0, tl.float32)
        for run in range(0, runs, TILE_RUNS):
            if weigh(_highest_of_tile(tops, run, runs, TILE_RUNS), best, temperature) >= lowest:
                weight = _load_weights(logits, run, best, temperature, vocabulary, TILE, RUN)
                value = tl.full([TILE], 1.0, tl.float32) if COUNT else weight
                from_first += tl.where(weight >= first, value, 0.0)
                from_second += tl.where(weight >= second, value, 0.0)
                from_third += tl.where(weight >= third, value, 0.0)
                least = tl.minimum(least, tl.where(weight >= lowest, weight, 2.0))
                most = tl.maximum(most, tl.where(weight < end, weight, 0.0))
        reached = (tl.sum(from_first.to(tl.float64), 0) >= target).to(tl.int32)
        reached += (tl.sum(from_second.to(tl.float64), 0) >= target).to(tl.int32)
        reached += (tl.sum(from_third.to(tl.float64), 0) >= target).to(tl.int32)
        smallest = tl.min(least, 0).to(tl.int32, bitcast=True)
        largest = tl.max(most, 0).to(tl.int32, bitcast=True)
        if smallest >= largest:  # one value in the interval, or none
            low = tl.maximum(low, largest)
            high = low + 1
        else:
            high = tl.minimum(low + (reached + 1) * step, high)
            low = low + reached * step
    return tl.minimum(low, _BITS_OF_ONE)  # a target of 0 is always reached


@triton.jit
def _sum_kept(
    logits, tops, best, temperature, minimum, most, vocabulary, runs, TILE_RUNS: tl.constexpr, RUN: tl.constexpr
):
    """Sum of the weights >= `minimum`; of those that equal it only as many as make `most` tokens in all."""
    TILE: tl.constexpr = TILE_RUNS * RUN
    total = tl.zeros([TILE], tl.float32)
    above = tl.zeros([TILE], tl.float32)
    equal = tl.zeros([TILE], tl.float32)
    for run in range(0, runs, TILE_RUNS):
        if weigh(_highest_of_tile(tops, run, runs, TILE_RUNS), best, temperature) >= minimum:
            weight = _load_weights(logits, run, best, temperature, vocabulary, TILE, RUN)
            total += tl.where(weight > minimum, weight, 0.0)
            above += tl.where(weight > minimum, 1.0, 0.0)
            equal += tl.where(weight == minimum, 1.0, 0.0)
    kept = tl.minimum(tl.sum(equal, 0), most - tl.sum(above, 0))
    return tl.sum(total.to(tl.float64), 0) + kept.to(tl.float64) * minimum.to(tl.float64)


@triton.jit
def minimum_kernel(
    logits, parameters, slots, tops, minimums, stride, vocabulary, runs,
    RUNS: tl.constexpr, TILE_RUNS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    if slot >= 0:
        tops += row.to(tl.int64) * runs
        logits += row.to(tl.int64) * stride
        j = tl.arange(0, RUNS)
        best = tl.max(tl.load(tops + j, mask=j < runs, other=-float("inf")), 0)
        temperature, min_p, top_k, top_p = load_row(parameters, slot)
        low = slot * 0
        if (temperature > 0.0) & (best > -float("inf")) & (best < float("inf")):
            limited = (top_k > 0) & (top_k < vocabulary)
            if limited:
                low = _largest(
                    logits, tops, best, temperature, low, top_k.to(tl.float64), vocabulary, runs,
                    True, TILE_RUNS, RUN,
                )  # fmt: skip
            most = tl.where(limited & (low.to(tl.float32, bitcast=True) >= min_p), top_k, vocabulary)
            low = tl.maximum(low, min_p.to(tl.int32, bitcast=True))
            if top_p < 1.0:
                whole = _sum_kept(
                    logits, tops, best, temperature, low.to(tl.float32, bitcast=True), most.to(tl.float32),
                    vocabulary, runs, TILE_RUNS, RUN,
                )  # fmt: skip
                low = _largest(
                    logits, tops, best, temperature, low, top_p * whole, vocabulary, runs, False, TILE_RUNS, RUN
                )
        tl.store(minimums + row * 2, low.to(tl.float32, bitcast=True))
        tl.store(minimums + row * 2 + 1, best)


def find_minimums(logits: Tensor, parameters: Tensor, slots: Tensor, tops: Tensor, minimums: Tensor, run: int) -> None:
    """Write each row's minimum weight, 0 if all tokens are kept, and its highest logit.

    Args:
        logits: [rows, vocabulary]; rows may be apart.
        parameters: int32[slots, PARAMETERS].
        slots: int32[rows]; -1: padding, for which nothing is written.
        tops: float32[rows, runs], the highest logit of each run.
        minimums: float32[rows, 2].
        run: tokens of a run, a power of two.
    """
    rows, vocabulary = logits.shape
    runs = triton.cdiv(vocabulary, run)
    minimum_kernel[(rows,)](
        logits, parameters, slots, tops, minimums, logits.stride(0), vocabulary, runs,
        RUNS=next_power_of_2(runs), TILE_RUNS=TILE_RUNS, RUN=run, num_warps=WARPS,
    )  # fmt: skip
