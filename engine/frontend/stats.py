"""What the front end counts for `/metrics`: cheap enough to be fed for each token."""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from engine.messages import Stats

SECONDS_TO_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80, 160)
SECONDS_BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
SECONDS_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)


class Histogram:
    """Counts by upper bound, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last: above all bounds
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Pairs of upper bound and how many lie at or below it, as Prometheus wants them."""
        pairs: list[tuple[str, float]] = []
        below = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            below += count
            pairs.append(("+Inf" if bound == float("inf") else str(float(bound)), below))
        return pairs


@dataclass(slots=True)
class FrontEndStats:
    """Counters and histograms of one front end, and the core's latest own."""

    core: Stats = field(default_factory=Stats)
    finished: Counter[str] = field(default_factory=Counter)  # requests by the reason of their end
    ttft: Histogram = field(default_factory=lambda: Histogram(SECONDS_TO_FIRST))
    itl: Histogram = field(default_factory=lambda: Histogram(SECONDS_BETWEEN))
    e2e: Histogram = field(default_factory=lambda: Histogram(SECONDS_WHOLE))
    queue: Histogram = field(default_factory=lambda: Histogram(SECONDS_WHOLE))
    prompt_tokens: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    generation_tokens: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    step_tokens: Histogram = field(default_factory=lambda: Histogram(STEP_TOKENS))

    def take_core(self, stats: Stats) -> None:
        """Keep the core's counters; what they grew by since the last message is a step's tokens."""
        before = self.core.prompt_tokens + self.core.generation_tokens
        grown = stats.prompt_tokens + stats.generation_tokens - before
        if grown > 0:
            self.step_tokens.observe(grown)
        self.core = stats
