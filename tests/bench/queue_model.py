"""A queue in simulated time, and the real search run against it."""

import heapq
import math
from dataclasses import dataclass

import numpy as np

from bench.arrivals import arrival_times, point_seed
from bench.criteria import Evidence, Flow, judge
from bench.metrics import WindowState
from bench.plan import Planner, TimeBudget, phase_repeat
from bench.results import Answer, PointRow
from bench.search import Trial, find_sustained
from tests.bench.rows import plain_point


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


@dataclass(slots=True)
class SimulatedBench:
    """What `redline bench` does with a server, with the queue in the server's place and no time passing."""

    slots: int
    seed: int
    precision: float
    service_s: float = 1.0
    max_minutes: float = math.inf
    now_s: float = 0.0

    def search(self, start_rate: float) -> tuple[Answer, list[PointRow]]:
        """The real search, plan of windows and criteria."""
        budget = TimeBudget(60 * self.max_minutes, clock=lambda: self.now_s)
        budget.start()
        planner = Planner(budget, self.precision, ladder=False)
        return find_sustained(lambda t: self.measure(planner, t), start_rate=start_rate, precision=self.precision)

    def measure(self, planner: Planner, trial: Trial) -> PointRow | None:
        lengths = planner.lengths(trial, self.service_s)
        if lengths is None:
            return None
        count, warmup = round(trial.rate * lengths.window_s), max(1, round(trial.rate * lengths.warmup_s))
        drawn = point_seed(self.seed, "20/5", trial.rate, phase_repeat(trial.phase, trial.repeat))
        flow = queue(trial.rate, self.slots, self.service_s, count, drawn, warmup)
        self.now_s += flow.end_s + self.service_s
        seen = Evidence(flow, WindowState(preemptions=0), requests=flow.arrived(), fastest_s=self.service_s)
        verdict = judge(seen)
        return plain_point(
            rate=trial.rate, phase=trial.phase, repeat=trial.repeat, sustained=verdict.sustained,
            requests=flow.arrived(), window_s=flow.window_s, achieved_rate=flow.completed() / flow.window_s,
            backlog_growth=verdict.growth, backlog_noise=verdict.noise, binding=verdict.binding, reason=verdict.reason,
        )  # fmt: skip
