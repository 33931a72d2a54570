"""Gaps between tokens as an engine with continuous batching makes them: all requests of a step share its duration."""

from dataclasses import dataclass

import numpy as np

_LENGTHS = 16, 113  # tokens of an answer, drawn evenly
_MEAN_LENGTH = 64
_STEP_S = 0.02
_LONG_RATE, _CHUNKS, _CHUNK_S = 0.01, 3, 0.06  # long prompts a step, steps each takes, seconds more in each of them
_DELIVERY_S = 0.0005  # chunks of one step arrive up to so much apart


@dataclass(frozen=True, slots=True)
class Steps:
    """A run of the engine: `births` are the steps in which requests get their first token."""

    ends_s: np.ndarray  # float64[steps]
    births: np.ndarray  # int64[requests], sorted
    lengths: np.ndarray  # int64[requests], tokens


def run_engine(slots: int, steps: int, seed: int) -> Steps:
    """Poisson arrivals that keep `slots` requests running on average; durations are lognormal and grow with the batch.

    A request's prompt lengthens the step of its first token; a long one is computed in chunks, in the steps before too.
    """
    rng = np.random.default_rng(seed)
    counts = rng.poisson(slots / _MEAN_LENGTH, steps)
    births = np.repeat(np.arange(steps), counts)
    lengths = rng.integers(*_LENGTHS, len(births))
    running = np.zeros(steps + _LENGTHS[1])
    np.add.at(running, births, 1)
    np.add.at(running, births + lengths, -1)
    durations = _STEP_S * (1 + np.cumsum(running)[:steps] / 64) * np.exp(0.1 * rng.standard_normal(steps))
    prefill = 0.015 * np.exp(0.5 * rng.standard_normal(len(births)))
    np.add.at(durations, births, prefill)
    long = births[rng.random(len(births)) < _LONG_RATE * _MEAN_LENGTH / slots]
    for chunk in range(_CHUNKS):
        np.add.at(durations, np.maximum(long - chunk, 0), _CHUNK_S * np.exp(0.3 * rng.standard_normal(len(long))))
    return Steps(np.cumsum(durations), births, lengths)


def true_percentile(slots: int, q: float, steps: int = 1_000_000) -> float:
    """The percentile of the gaps of one long run, in seconds."""
    run = run_engine(slots, steps, seed=10_000_019)
    durations = np.diff(run.ends_s, prepend=0.0)
    sharing = np.zeros(steps + _LENGTHS[1])  # requests for which a step ends a gap
    np.add.at(sharing, run.births + 1, 1)
    np.add.at(sharing, run.births + run.lengths, -1)
    weights = np.cumsum(sharing)[:steps]
    order = np.argsort(durations)
    place = np.searchsorted(np.cumsum(weights[order]), q / 100 * weights.sum())
    return float(durations[order][place])


def streams(slots: int, steps: int, seed: int) -> tuple[list[float], list[np.ndarray]]:
    """Arrival of the first chunk and the gaps of every request that starts within `steps` steps of steady state."""
    run = run_engine(slots, steps + 2 * _LENGTHS[1], seed)
    rng = np.random.default_rng(seed + 1)
    mine = (run.births >= _LENGTHS[1]) & (run.births < steps + _LENGTHS[1])
    first, gaps = [], []
    for birth, length in zip(run.births[mine], run.lengths[mine], strict=True):
        arrivals = run.ends_s[birth : birth + length] + _DELIVERY_S * rng.random(length)
        first.append(float(arrivals[0]))
        gaps.append(np.diff(arrivals))
    return first, gaps
