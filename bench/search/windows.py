"""Divides the time limit of a run among the windows of its load points."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from bench.results import Phase
from bench.search.bracket import CONFIRMATION_RUNS, Trial, bisections, round_rate

LADDER = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)  # x the rate found
# Limit in virtual time, which costs little: what a search with full windows takes for long outputs of large models.
MAX_VIRTUAL_MINUTES = 1440.0
WINDOW_LATENCIES = 5  # length of a full window in E2E latencies
WARMUP_LATENCIES = 1.25
# With long outputs a batch takes several latencies to become steady; in virtual time the wait costs little.
VIRTUAL_WARMUP_LATENCIES = 3.0
_OVERHEAD_S = 1.0  # between load points: connecting, draining, writing
_SEARCH_SHARE, _CONFIRM_SHARE = 0.68, 0.85  # of the limit, if a ladder follows
_LEAST_LATENCIES, _LEAST_REQUESTS = 1.5, 5  # a shorter window is not worth measuring
_DOUBLING_REQUESTS = 24


@dataclass(slots=True)
class TimeBudget:
    """A time limit in seconds that starts with `start()`; `stopped` (Ctrl-C) ends it at once."""

    limit_s: float
    clock: Callable[[], float] = time.monotonic
    stopped: bool = False
    _start: float = field(default=math.nan)

    def start(self) -> None:
        self._start = self.clock()

    def used_s(self) -> float:
        return self.clock() - self._start

    def left_s(self, share: float = 1.0) -> float:
        """Seconds until `share` of the limit is used; 0 once stopped."""
        return 0.0 if self.stopped else max(0.0, share * self.limit_s - self.used_s())


@dataclass(frozen=True, slots=True)
class Timing:
    """Lengths of the parts of a load point in seconds."""

    warmup_s: float
    window_s: float
    drain_s: float  # limit of the time after the window, for the requests that are still open


@dataclass(frozen=True, slots=True)
class Planner:
    """Chooses the windows of load points from the remaining time."""

    budget: TimeBudget
    precision: float
    ladder: bool
    window_s: float | None = None  # --window: used for all load points
    warmup_latencies: float = WARMUP_LATENCIES
    warmup_s: float | None = None  # --warmup: used for all load points

    def full_window(self, rate: float, latency_s: float) -> float:
        """The window for the precision in seconds: at least 5 x the E2E latency and (2 / precision)^2 requests."""
        return max(WINDOW_LATENCIES * latency_s, full_requests(self.precision) / rate)

    def search_timing(self, trial: Trial, latency_s: float) -> Timing | None:
        """Timing of the next load point of a search; None if no useful window fits into the remaining time."""
        # A run that only narrows the interval must not use the ladder's time either.
        early = trial.phase == "search" or trial.whole
        share = (_SEARCH_SHARE if early else _CONFIRM_SHARE) if self.ladder else 1.0
        left = self.budget.left_s(share)
        if trial.phase == "search":
            left -= self._confirmation(trial.rate, latency_s)
        wanted = self.full_window(trial.rate, latency_s)
        if trial.window_s:
            wanted = max(wanted, trial.window_s)
            if self.window_s is not None or left < wanted + self._overhead(latency_s):
                return None
            return self._fit(trial.rate, latency_s, left, 1, wanted)
        if trial.whole and left < (self.window_s or wanted) + self._overhead(latency_s):
            return None
        if trial.phase == "search" and trial.points_left > 1 + bisections(2.0, self.precision):
            # Doubling: all but the last rate are far from the answer, so short windows suffice.
            wanted = min(wanted, max(WINDOW_LATENCIES * latency_s, _DOUBLING_REQUESTS / trial.rate))
        return self._fit(trial.rate, latency_s, left, trial.points_left, wanted)

    def ladder_timing(self, rate: float, found: float, latency_s: float, points_left: int) -> Timing | None:
        """Timing of a load point of the ladder: the window of the rate found for all its rates, if time allows."""
        wanted = self.full_window(found, latency_s)
        return self._fit(rate, latency_s, self.budget.left_s(), points_left, wanted)

    def fixed_timing(self, rate: float, latency_s: float, points_left: int) -> Timing | None:
        """Timing of a load point at a given rate."""
        return self._fit(rate, latency_s, self.budget.left_s(), points_left, self.full_window(rate, latency_s))

    def expected_s(self, start_rate: float, latency_s: float) -> tuple[float, float]:
        """Expected seconds of a search with its ladder, if the answer is 4 and 32 times the start rate."""
        return tuple(  # type: ignore[return-value]
            min(self.budget.limit_s, self._search_s(start_rate, latency_s, d)) for d in (2, 5)
        )

    def fixed_s(self, rates: list[float], latency_s: float) -> float:
        windows = sum(self.window_s or self.full_window(r, latency_s) for r in rates)
        return min(self.budget.limit_s, windows + len(rates) * self._overhead(latency_s))

    def _search_s(self, start_rate: float, latency_s: float, doublings: int) -> float:
        found = start_rate * 2**doublings
        full = self.window_s or self.full_window(found, latency_s)
        short = self.window_s or WINDOW_LATENCIES * latency_s
        fine = bisections(2.0, self.precision) + CONFIRMATION_RUNS
        ladder = len(LADDER) * full if self.ladder else 0.0
        points = doublings + 2 + fine + (len(LADDER) if self.ladder else 0)
        return (doublings + 2) * short + fine * full + ladder + points * self._overhead(latency_s)

    def _confirmation(self, rate: float, latency_s: float) -> float:
        """The least time to keep for a confirmation, so that a search that runs out of time still has an answer."""
        return (self.window_s or self._least(rate, latency_s)) + self._overhead(latency_s)

    def _fit(self, rate: float, latency_s: float, left_s: float, points: int, wanted_s: float) -> Timing | None:
        overhead = self._overhead(latency_s)
        if self.window_s is not None:
            window, least = self.window_s, self.window_s
        else:
            least = min(self._least(rate, latency_s), wanted_s)
            window = min(wanted_s, max(least, left_s / max(points, 1) - overhead))
        if self.budget.left_s() <= 0 or left_s < least + overhead:
            return None
        window = max(1, round(rate * window)) / rate  # the number of arrivals, rate x length, must be an integer
        # The last requests of the window need one latency more, and longer if they queue.
        return Timing(self._warmup(latency_s), window, max(3 * latency_s, 0.5 * window))

    def _overhead(self, latency_s: float) -> float:
        """Seconds of a load point outside its window."""
        return self._warmup(latency_s) + latency_s + _OVERHEAD_S

    def _warmup(self, latency_s: float) -> float:
        return self.warmup_latencies * latency_s if self.warmup_s is None else self.warmup_s

    def _least(self, rate: float, latency_s: float) -> float:
        return max(_LEAST_LATENCIES * latency_s, _LEAST_REQUESTS / rate)


def full_requests(precision: float) -> int:
    """The number of requests for which Poisson noise stays within half of `precision` (0..1)."""
    return math.ceil((2 / precision) ** 2 - 1e-9)


def is_provisional(precision: float, window_s: float, requests: int, latency_s: float) -> bool:
    """Whether a window was shorter than the precision requires, with 10 % tolerance since latencies are estimates."""
    enough = requests >= 0.9 * full_requests(precision) and window_s >= 0.9 * WINDOW_LATENCIES * latency_s
    return not enough


def ladder_rates(rate: float) -> list[float]:
    return [round_rate(share * rate) for share in LADDER]


def phase_repeat(phase: Phase, repeat: int) -> int:
    """A number for seeds that differs between all runs of one rate within a configuration, whatever their phase."""
    return {"search": 0, "confirm": 0, "fixed": 0, "ladder": 1000, "probe": 2000}[phase] + repeat
