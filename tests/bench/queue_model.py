"""A queue in simulated time, and the real search run against it."""

import heapq
import math
from dataclasses import dataclass

import numpy as np

from bench.results import Answer, PointRecord
from bench.search.bracket import Trial
from bench.search.criteria import Evidence, Flow, Verdict, judge
from bench.search.search import find_sustained
from bench.search.trend import WindowLatencies
from bench.search.windows import Planner, TimeBudget, phase_repeat
from bench.target.metrics import WindowState
from bench.workloads.arrivals import Arrivals, arrival_times, point_seed
from tests.bench.records import plain_point


def queue(rate: float, slots: int, service_s: float, requests: int, seed: int, warmup: int = 50) -> Flow:
    """Poisson arrivals at a server with `slots` places and a fixed service time; capacity is slots / service_s."""
    arrivals = np.concatenate(
        [arrival_times(rate, warmup / rate, seed), warmup / rate + arrival_times(rate, requests / rate, seed + 1)]
    )
    free = [0.0] * slots
    ends = []
    for at in arrivals:
        end = max(at, heapq.heappop(free)) + service_s
        heapq.heappush(free, end)
        ends.append(end)
    return Flow(arrivals, np.sort(ends), warmup / rate, (warmup + requests) / rate)


KINDS = ("steady", "noisy", "exponential", "bursts", "bursts, exponential")
_MEAN_S = 1.0  # of a service
_WARMUP = 1.25  # services, as the plan of windows has it


def verdict_of(
    kind: str, slots: int, load: float, requests: int, seed: int, precision: float = 0.1, latencies: bool = True
) -> Verdict:
    """The verdict on one window of `requests` at `load` x the capacity of a queue, warmed up as a load point is.

    Services are all alike, lognormal (noisy) or exponential; bursts are gamma arrivals of shape 0.25.
    """
    rate = load * slots / _MEAN_S
    warmup = max(1, round(_WARMUP * rate))
    parts = [count / rate for count in (warmup, requests, max(rate, requests))]
    arrivals = Arrivals("gamma", 0.25) if kind.startswith("bursts") else Arrivals()
    due_s = arrivals.schedule(rate, parts, seed)
    rng = np.random.default_rng(seed)
    service_s = np.full(len(due_s), _MEAN_S)
    if kind.endswith("exponential"):
        service_s = rng.exponential(_MEAN_S, len(due_s))
    elif kind == "noisy":
        service_s = _MEAN_S * np.exp(0.5 * rng.standard_normal(len(due_s)) - 0.125)
    free = [0.0] * slots
    begins_s = np.empty(len(due_s))
    for i, due in enumerate(due_s):
        begins_s[i] = max(due, heapq.heappop(free))
        heapq.heappush(free, begins_s[i] + service_s[i])
    ends_s = begins_s + service_s
    flow = Flow(due_s, np.sort(ends_s), parts[0], parts[0] + parts[1])
    inside = (due_s >= flow.start_s) & (due_s < flow.end_s)
    found = WindowLatencies(due_s[inside], (begins_s - due_s)[inside], (ends_s - due_s)[inside]) if latencies else None
    fastest_s = float((ends_s - due_s)[inside].min())
    seen = Evidence(
        flow, WindowState(preemptions=0), requests=int(inside.sum()), latencies=found, precision=precision,
        fastest_s=fastest_s,
    )  # fmt: skip
    return judge(seen)


@dataclass(slots=True)
class SimulatedBench:
    """What `redline bench` does with a server, with the queue in the server's place and no time passing."""

    slots: int
    seed: int
    precision: float
    service_s: float = 1.0
    max_minutes: float = math.inf
    now_s: float = 0.0

    def search(self, start_rate: float) -> tuple[Answer, list[PointRecord]]:
        """The real search, plan of windows and criteria."""
        budget = TimeBudget(60 * self.max_minutes, clock=lambda: self.now_s)
        budget.start()
        planner = Planner(budget, self.precision, ladder=False)
        return find_sustained(lambda t: self.measure(planner, t), start_rate=start_rate, precision=self.precision)

    def measure(self, planner: Planner, trial: Trial) -> PointRecord | None:
        lengths = planner.search_timing(trial, self.service_s)
        if lengths is None:
            return None
        count, warmup = round(trial.rate * lengths.window_s), max(1, round(trial.rate * lengths.warmup_s))
        drawn = point_seed(self.seed, "20/5", trial.rate, phase_repeat(trial.phase, trial.repeat))
        flow = queue(trial.rate, self.slots, self.service_s, count, drawn, warmup)
        self.now_s += flow.end_s + self.service_s
        seen = Evidence(
            flow,
            WindowState(preemptions=0),
            requests=flow.arrived(),
            fastest_s=self.service_s,
            precision=self.precision,
        )
        verdict = judge(seen)
        return plain_point(
            rate=trial.rate, phase=trial.phase, repeat=trial.repeat, sustained=verdict.sustained,
            requests=flow.arrived(), window_s=flow.window_s, achieved_rate=flow.completed() / flow.window_s,
            verdict=verdict.name, backlog_growth=verdict.growth, backlog_noise=verdict.noise,
            binding=verdict.binding,
            reason=verdict.reason,
        )  # fmt: skip
