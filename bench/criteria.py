"""When a rate counts as sustained, and what binds when it doesn't: pure functions over what was recorded.

The window's arrivals are drawn with an exact count N, so nearly all of the noise in `N - completions` comes from the
two edges of the window. Two tolerances follow. Requests in flight at an edge number L = rate x latency with a spread
of about sqrt(L); and over N requests a queue near saturation strays by about sqrt(N) without being overloaded, which is
half of the asked precision when N = (2 / precision)^2.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.metrics import WindowState
from bench.results import PointRow, RequestRow

FULL_KV = 0.97
_GRID = 200  # points at which the backlog is looked at


@dataclass(frozen=True, slots=True)
class Flow:
    """Arrivals and departures of a load point, all requests; seconds since its start."""

    arrivals_s: np.ndarray  # intended send times, sorted
    completions_s: np.ndarray  # of requests that ended well, sorted
    start_s: float  # the window
    end_s: float

    @property
    def window_s(self) -> float:
        return self.end_s - self.start_s

    def arrived(self) -> int:
        return _inside(self.arrivals_s, self.start_s, self.end_s)

    def completed(self) -> int:
        return _inside(self.completions_s, self.start_s, self.end_s)

    def due(self, latency_s: float) -> int:
        """Arrivals that a server of this latency completes within the window."""
        return _inside(self.arrivals_s, self.start_s - latency_s, self.end_s - latency_s)

    def backlog(self, at_s: np.ndarray) -> np.ndarray:
        """Requests sent and not finished at each time."""
        return np.searchsorted(self.arrivals_s, at_s, "right") - np.searchsorted(self.completions_s, at_s, "right")

    def growth(self) -> float:
        """Requests by which the backlog grew over the window.

        The smaller of two views, since chance seldom bends both: the slope of a straight line through the backlog x the
        window's length, and its difference between the window's ends; 0 where they contradict each other.
        """
        if self.window_s <= 0:
            return 0.0
        grid = np.linspace(self.start_s, self.end_s, _GRID)
        slope = float(np.polyfit(grid, self.backlog(grid), 1)[0] * self.window_s)
        ends = float(self.arrived() - self.completed())
        return min(slope, ends, key=abs) if slope * ends > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """`sustained` is None where the point can't be judged."""

    valid: bool
    sustained: bool | None
    reason: str
    binding: str = ""  # set when unsustained or held back by the client
    growth: float = 0.0  # of the backlog over the window, in requests
    noise: float = 0.0  # growth up to here says nothing


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that a load point is judged by."""

    flow: Flow
    server: WindowState
    failed: Mapping[str, int] = field(default_factory=dict)  # kind -> requests of the window
    missed_lengths: int = 0  # requests of the window whose output hadn't the asked length
    requests: int = 0  # of the window
    client_fault: str = ""  # why the load generator can't be trusted, else empty
    cut: str = ""  # why the point ended early: "" or the overload that was seen, or "time"
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # column -> (seen, allowed)
    fastest_s: float = 0.0  # the lowest E2E latency of the window: nothing that came later than that is owed yet


def tolerance(count: float, in_flight: float) -> float:
    """Growth of the backlog, in requests, that is still noise in a window of `count` arrivals."""
    return max(math.sqrt(max(count, 0.0)), 2 * math.sqrt(2 * max(in_flight, 0.0)), 2.0)


def judge(e: Evidence) -> Verdict:
    """Apply the sustained rule: nothing preempted, nothing failed, the backlog steady, completions keeping up."""
    invalid = _invalid(e)
    if invalid is not None:
        return invalid
    count = e.flow.arrived()
    grid = np.linspace(e.flow.start_s, e.flow.end_s, _GRID)
    # The lower quarter stands for a steady state: a growing queue must not widen its own tolerance.
    noise = tolerance(count, float(np.quantile(e.flow.backlog(grid), 0.25)))
    growth = e.flow.growth()
    seen = f"{growth:+.0f}, noise ±{noise:.0f}"
    reason, bound = _broken_rule(e, growth, noise, seen)
    if reason:
        return Verdict(True, False, reason, bound or binding(e.server), growth, noise)
    counter = "" if e.server.preemptions is not None else "; no preemption counter"
    return Verdict(True, True, f"backlog steady ({seen}){counter}", "", growth, noise)


def _broken_rule(e: Evidence, growth: float, noise: float, seen: str) -> tuple[str, str]:
    """The first rule that is broken, and what binds where that follows from the rule; ("", "") if none is."""
    if e.failed:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(e.failed.items()))
        return f"{sum(e.failed.values())} of {e.requests} requests failed ({kinds})", ""
    if e.server.preemptions:
        return f"{e.server.preemptions} preemptions", "KV cache"
    if e.cut:
        return e.cut, ""
    if growth > noise:
        return f"backlog grew ({seen})", ""
    completed, due = e.flow.completed(), e.flow.due(e.fastest_s)
    if completed < 0.95 * due - noise:
        return f"completions did not keep up ({completed} of {due} that were due)", ""
    for column, (value, limit) in e.limits.items():
        if not value <= limit:  # a latency that is not a number fails too
            return f"{column} {value:.4g} is above its limit {limit:.4g}", "latency limit"
    return "", ""


def _invalid(e: Evidence) -> Verdict | None:
    if e.client_fault:
        return Verdict(False, None, f"the load generator was the bottleneck: {e.client_fault}", "client")
    if e.cut == "time":
        return Verdict(False, None, "ended before its window was over")
    if e.requests == 0:
        return Verdict(False, None, "no request fell into the window")
    if e.missed_lengths:
        return Verdict(False, None, f"{e.missed_lengths} of {e.requests} outputs had not the asked length")
    broken = sum(n for kind, n in e.failed.items() if kind == "connection")
    if broken == e.requests:
        return Verdict(False, None, "no request reached the server")
    return None


def binding(server: WindowState) -> str:
    """What an unsustained point ran into, as far as the server's own readings tell."""
    full = (server.kv_use_max or 0.0) >= FULL_KV and (server.waiting_max or 0) > 0
    if server.preemptions or full:
        return "KV cache"
    return "rows" if server.full_rows else "compute"


def overload(
    sent_backlog: tuple[int, int], elapsed_s: float, rate: float, latency_s: float, waiting: tuple[float, float] | None
) -> str:
    """Whether a point under way is so clearly overloaded that the rest of its window can be spared; "" if not.

    sent_backlog: requests open at the start of the window and now; elapsed_s: since then; latency_s: expected E2E;
    waiting: the server's queue at the start of the window and now, if it tells.
    """
    count = rate * elapsed_s
    allowed = 3 * tolerance(count, max(sent_backlog[0], rate * latency_s))
    growth = sent_backlog[1] - sent_backlog[0]
    if elapsed_s < latency_s or growth <= allowed:
        return ""
    if waiting is not None and waiting[1] - waiting[0] <= allowed / 2:
        return ""  # requests are being served, only more at a time: still on its way to a steady state
    return f"backlog grew by {growth} in {elapsed_s:.0f} s"


def flow_of(rows: Sequence[RequestRow], start_s: float, end_s: float) -> Flow:
    """Arrivals of all requests that were sent; completions of those that ended well."""
    arrivals = np.sort(np.array([r.intended_s for r in rows], dtype=np.float64))
    completions = [r.intended_s + r.e2e_s for r in rows if r.status == "ok" and r.e2e_s is not None]
    return Flow(arrivals, np.sort(np.array(completions, dtype=np.float64)), start_s, end_s)


def binding_of_search(rows: Sequence[PointRow], high: float | None) -> str:
    """What binds a search's answer: what the runs at its upper end ran into, the one with most requests first."""
    blocked = [r for r in rows if r.rate == high and not r.sustained]
    longest = max(blocked, key=lambda r: r.requests, default=None)
    return (longest.binding or "compute") if longest is not None else "not reached"


def _inside(times: np.ndarray, start: float, end: float) -> int:
    low, high = np.searchsorted(times, (start, end), "left")
    return int(high - low)
