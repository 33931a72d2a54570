"""The rules that decide whether a rate is sustained, and what limits it if it is not: pure functions of a recording.

The window's arrivals are drawn with an exact count N, so nearly all of the noise in `N - completions` comes from the
two edges of the window. This gives two tolerances. L = rate x latency requests are in flight at an edge, with a spread
of about sqrt(L). Over N requests the queue of a server near saturation varies by about sqrt(N) without being
overloaded; this is half of the precision when N = (2 / precision)^2.

The verdict is "sustained" only if an overload by `precision` would have been visible in the backlog or in the latencies
of this window. Otherwise, if no rule is broken, it is "undecided".
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.results import PointRecord, RequestRecord
from bench.search.trend import Trend, WindowLatencies, trend
from bench.statistics.student import STUDENT_T_ONE_SIDED
from bench.target.metrics import WindowState

FULL_KV = 0.97
_GRID = 200  # times at which the backlog is sampled
_IDLE = 0.2  # share of a window without open requests (half of it in the second half) that excludes a growing queue
_PARTS = 8  # parts of a window: the changes of the backlog between them give its noise


@dataclass(frozen=True, slots=True)
class Flow:
    """Arrivals and completions of all requests of a load point, in seconds since its start."""

    arrivals_s: np.ndarray  # intended send times, sorted
    completions_s: np.ndarray  # of successful requests, sorted
    start_s: float  # of the window
    end_s: float

    @property
    def window_s(self) -> float:
        return self.end_s - self.start_s

    def arrived(self) -> int:
        return _inside(self.arrivals_s, self.start_s, self.end_s)

    def completed(self) -> int:
        return _inside(self.completions_s, self.start_s, self.end_s)

    def due(self, latency_s: float) -> int:
        """Arrivals that a server with this latency completes within the window."""
        return _inside(self.arrivals_s, self.start_s - latency_s, self.end_s - latency_s)

    def backlog(self, at_s: np.ndarray) -> np.ndarray:
        """Requests sent and not finished at each time."""
        return np.searchsorted(self.arrivals_s, at_s, "right") - np.searchsorted(self.completions_s, at_s, "right")

    def growth(self) -> float:
        """Growth of the backlog over the window, in requests.

        The smaller of two estimates, since noise seldom affects both: the slope of a straight line fitted to the
        backlog x the window's length, and the difference between the ends of the window. 0 if their signs differ.
        """
        if self.window_s <= 0:
            return 0.0
        grid = np.linspace(self.start_s, self.end_s, _GRID)
        slope = float(np.polyfit(grid, self.backlog(grid), 1)[0] * self.window_s)
        ends = float(self.arrived() - self.completed())
        return min(slope, ends, key=abs) if slope * ends > 0 else 0.0

    def spread(self) -> float:
        """Growth of the backlog up to which it is noise (95 %, one-sided) if its changes are independent."""
        edges = np.linspace(self.start_s, self.end_s, _PARTS + 1)
        return STUDENT_T_ONE_SIDED[_PARTS - 1] * math.sqrt(_PARTS) * float(np.std(np.diff(self.backlog(edges)), ddof=1))

    def idle_share(self, start_s: float, end_s: float) -> float:
        """The share of a period in which no request was open: a lower bound of the server's spare capacity."""
        changes = np.concatenate((self.arrivals_s, self.completions_s))
        inside = np.sort(changes[(changes > start_s) & (changes < end_s)])
        edges = np.concatenate(([start_s], inside, [end_s]))
        empty = self.backlog(edges[:-1]) <= 0
        return float(np.diff(edges)[empty].sum()) / max(end_s - start_s, 1e-9)

    def latencies(self) -> WindowLatencies:
        """Latencies of the window, assuming that requests complete in the order of arrival."""
        count = min(len(self.arrivals_s), len(self.completions_s))
        inside = np.flatnonzero((self.arrivals_s[:count] >= self.start_s) & (self.arrivals_s[:count] < self.end_s))
        due_s = self.arrivals_s[inside]
        latency_s = self.completions_s[inside] - due_s
        return WindowLatencies(due_s, latency_s, latency_s)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict of a load point; `sustained` is None if it is invalid or undecided."""

    valid: bool
    sustained: bool | None
    reason: str
    binding: str = ""  # set if not sustained, or if the client was the limit
    growth: float = 0.0  # of the backlog over the window, in requests
    noise: float = 0.0  # growth up to this value is not significant
    ttft_trend: float | None = None  # seconds per second; None: too few requests

    @property
    def name(self) -> str:
        """The verdict as it is written to result files."""
        if not self.valid:
            return "invalid"
        return {True: "sustained", False: "not sustained", None: "undecided"}[self.sustained]


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that a load point is judged by."""

    flow: Flow
    server: WindowState
    failed: Mapping[str, int] = field(default_factory=dict)  # kind of failure -> requests of the window
    missed_lengths: int = 0  # requests of the window whose output did not have the requested length
    requests: int = 0  # in the window
    client_fault: str = ""  # why the load generator cannot be trusted, else ""
    load_fault: str = ""  # why the load was not the one that was requested, else ""
    cut: str = ""  # why the load point ended early: the overload that was seen, or "time"; else ""
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # column -> (measured, allowed)
    latencies: WindowLatencies | None = None  # None: derived from arrivals and completions
    precision: float = 0.1  # 0..1: an overload by this share must be visible for the verdict "sustained"
    fastest_s: float = 0.0  # lowest E2E latency of the window: later arrivals cannot have completed yet


def tolerance(count: float, in_flight: float) -> float:
    """Growth of the backlog, in requests, up to which it is noise in a window of `count` arrivals."""
    return max(math.sqrt(max(count, 0.0)), 2 * math.sqrt(2 * max(in_flight, 0.0)), 2.0)


def judge(e: Evidence) -> Verdict:
    """Judge a load point: no failures, no preemptions, a steady backlog, completions that keep up, stable latencies."""
    invalid = _invalid(e)
    if invalid is not None:
        return invalid
    count = e.flow.arrived()
    grid = np.linspace(e.flow.start_s, e.flow.end_s, _GRID)
    # The lower quartile is close to a steady state: a growing queue must not widen its own tolerance.
    noise = tolerance(count, float(np.quantile(e.flow.backlog(grid), 0.25)))
    growth = e.flow.growth()
    seen = f"{growth:+.0f} requests, noise ±{noise:.0f}"
    latencies = e.latencies if e.latencies is not None else e.flow.latencies()
    trends = trend(latencies.due_s, latencies.ttft_s), trend(latencies.due_s, latencies.latency_s)
    slope = trends[0].slope if trends[0] is not None else None
    reason, bound = _broken_rule(e, growth, noise, seen)
    if not reason:
        reason = _grown_latency(e, trends)
    if reason:
        return Verdict(True, False, reason, bound or binding(e.server), growth, noise, slope)
    doubt = _doubt(e, growth, noise, trends, latencies.latency_s)
    if doubt:
        return Verdict(True, None, f"undecided: {doubt}", "", growth, noise, slope)
    counter = "" if e.server.preemptions is not None else "; no preemption counter"
    return Verdict(True, True, f"backlog steady ({seen}){counter}", "", growth, noise, slope)


def overload_share(precision: float) -> float:
    """Growth of the backlog per arrival at a rate that is `precision` above the capacity.

    It is also the growth of latencies in seconds per second.
    """
    return precision / (1 + precision)


def _grown_latency(e: Evidence, trends: tuple[Trend | None, Trend | None]) -> str:
    """The reason if a latency grew beyond noise as in a queue without bound, else ""."""
    for name, found in zip(("TTFT", "latency"), trends, strict=True):
        if found is not None and found.slope - found.noise > overload_share(e.precision):
            return f"{name} grew by {found.slope * e.flow.window_s:.2g} s within the window of {e.flow.window_s:.3g} s"
    return ""


def _doubt(
    e: Evidence, growth: float, noise: float, trends: tuple[Trend | None, Trend | None], latency_s: np.ndarray
) -> str:
    """Why the window is undecided; "" if an overload would have been visible in it."""
    typical_s = float(np.median(latency_s)) if len(latency_s) else 0.0
    if e.flow.window_s < typical_s:
        return f"the window of {e.flow.window_s:.3g} s is shorter than a typical request ({typical_s:.3g} s)"
    share = overload_share(e.precision)
    shown = share * e.flow.arrived()
    by_count = noise <= shown and growth + e.flow.spread() <= shown
    by_latency = all(t is not None and t.slope + t.noise <= share for t in trends)
    middle_s = (e.flow.start_s + e.flow.end_s) / 2
    idle = e.flow.idle_share(e.flow.start_s, e.flow.end_s), e.flow.idle_share(middle_s, e.flow.end_s)
    uneven = float(np.std(latency_s)) / typical_s if typical_s > 0 else 1.0
    enough = _IDLE + 1.65 * uneven / math.sqrt(max(len(latency_s), 1))  # a few requests may be fast by chance
    by_idling = idle[0] >= enough and idle[1] >= enough / 2
    if by_count or by_latency or by_idling:
        return ""
    known = [t for t in trends if t is not None]
    worst = max(known, key=lambda t: t.slope + t.noise, default=None)
    latency = f", latencies {worst.slope:+.2g} ±{worst.noise:.2g} s/s" if worst is not None else ""
    return (
        f"too few requests ({e.flow.arrived()}) to detect an overload of {e.precision:.0%}, which adds "
        f"{plain_count(shown)} requests to the backlog and {share:.2g} s/s to latencies; measured: backlog "
        f"{growth:+.0f} ±{max(noise, e.flow.spread()):.0f}{latency}"
    )


def plain_count(value: float) -> str:
    """A number of requests with two digits if it is small, and without an exponent if it is large."""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _broken_rule(e: Evidence, growth: float, noise: float, seen: str) -> tuple[str, str]:
    """The first broken rule as a reason, and the binding if the rule implies one; ("", "") if none is broken."""
    if e.failed:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(e.failed.items()))
        return f"{sum(e.failed.values())} of {e.requests} requests failed ({kinds})", ""
    if e.server.preemptions:
        count = e.server.preemptions
        return f"{count} preemption{'s' if count > 1 else ''}", "KV cache"
    if e.cut:
        return e.cut, ""
    if growth > noise:
        return f"backlog grew ({seen})", ""
    completed, due = e.flow.completed(), e.flow.due(e.fastest_s)
    if completed < 0.95 * due - noise:
        return f"completions did not keep up ({completed} of {due} due requests)", ""
    for column, (value, limit) in e.limits.items():
        if not value <= limit:  # NaN fails too
            return f"{column} {value:.4g} is above its limit {limit:.4g}", "latency limit"
    return "", ""


def _invalid(e: Evidence) -> Verdict | None:
    if e.load_fault:
        return Verdict(False, None, e.load_fault)
    if e.client_fault:
        return Verdict(False, None, f"the load generator was the bottleneck: {e.client_fault}", "client")
    if e.cut == "time":
        return Verdict(False, None, "the load point ended before its window was over")
    if e.requests == 0:
        return Verdict(False, None, "no request was due within the window")
    if e.missed_lengths:
        missed = f"{e.missed_lengths} of {e.requests} outputs did not have the requested length"
        return Verdict(False, None, missed)
    broken = sum(n for kind, n in e.failed.items() if kind == "connection")
    if broken == e.requests:
        return Verdict(False, None, "no request reached the server")
    return None


def binding(server: WindowState) -> str:
    """What limited a load point that is not sustained, according to the server's metrics."""
    full = (server.kv_use_max or 0.0) >= FULL_KV and (server.waiting_max or 0) > 0
    if server.preemptions or full:
        return "KV cache"
    return "batch slots" if server.slots_full else "compute"


def overload(
    sent_backlog: tuple[int, int], elapsed_s: float, rate: float, latency_s: float, waiting: tuple[float, float] | None
) -> str:
    """Why a running load point can be ended early: it is clearly overloaded; else "".

    Args:
        sent_backlog: open requests at the start of the window and now.
        elapsed_s: since the start of the window.
        rate: requests/s.
        latency_s: expected E2E latency.
        waiting: the server's queue at the start of the window and now; None if it is not known.
    """
    count = rate * elapsed_s
    allowed = 3 * tolerance(count, max(sent_backlog[0], rate * latency_s))
    growth = sent_backlog[1] - sent_backlog[0]
    if elapsed_s < latency_s or growth <= allowed:
        return ""
    if waiting is not None and waiting[1] - waiting[0] <= allowed / 2:
        return ""  # the batch grows, not the queue: not yet in a steady state
    return f"backlog grew by {growth} requests in {elapsed_s:.0f} s"


def flow_of(records: Sequence[RequestRecord], start_s: float, end_s: float) -> Flow:
    """Arrivals of all requests that were sent, completions of the successful ones."""
    arrivals = np.sort(np.array([r.intended_s for r in records], dtype=np.float64))
    completions = [r.intended_s + r.e2e_s for r in records if r.status == "ok" and r.e2e_s is not None]
    return Flow(arrivals, np.sort(np.array(completions, dtype=np.float64)), start_s, end_s)


def window_latencies(records: Sequence[RequestRecord], ended_s: float) -> WindowLatencies:
    """Latencies of the window's requests; an open one counts with its wait until `ended_s`, when the load ended."""
    mine = sorted((r for r in records if r.in_window and r.status in ("ok", "cut short")), key=lambda r: r.intended_s)
    tpots = [r.decode_s / max(1, r.later_tokens) if len(r.chunk_tokens) > 1 else 0.0 for r in mine]
    known = [tpot for tpot, r in zip(tpots, mine, strict=True) if r.ttft_s is not None]
    middle = float(np.median(known)) if known else 0.0
    later = float(np.mean([max(0, r.asked_output_tokens - 1) for r in mine])) if mine else 0.0
    due_s = np.array([r.intended_s for r in mine], dtype=np.float64)
    waits = [max(0.0, ended_s - r.intended_s) if r.ttft_s is None else r.ttft_s for r in mine]
    ttft_s = np.array(waits, dtype=np.float64)
    tpot_s = np.array([middle if r.ttft_s is None else t for t, r in zip(tpots, mine, strict=True)], dtype=np.float64)
    return WindowLatencies(due_s, ttft_s, ttft_s + later * tpot_s)


def binding_of_search(records: Sequence[PointRecord], high: float | None) -> str:
    """The binding of a search's answer: that of the run at its upper end with the most requests."""
    blocked = [r for r in records if r.rate == high and not r.sustained]
    longest = max(blocked, key=lambda r: r.requests, default=None)
    return (longest.binding or "compute") if longest is not None else "not reached"


def _inside(times: np.ndarray, start: float, end: float) -> int:
    low, high = np.searchsorted(times, (start, end), "left")
    return int(high - low)
