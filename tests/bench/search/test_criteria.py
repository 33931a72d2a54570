import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.search.criteria import Evidence, Flow, binding, judge, overload, plain_count, tolerance, window_latencies
from bench.search.trend import WindowLatencies
from bench.target.metrics import WindowState
from tests.bench.queue_model import KINDS, queue, verdict_of
from tests.bench.records import plain_request

QUIET = WindowState(preemptions=0)


def evidence(flow: Flow, **fields: object) -> Evidence:
    plain: dict[str, object] = {"flow": flow, "server": QUIET, "requests": flow.arrived()}
    return Evidence(**(plain | fields))  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None, derandomize=True)  # statistical: the same draws at every run
@given(st.integers(0, 10_000), st.sampled_from([1, 8, 64]), st.floats(0.3, 0.85))
def test_below_capacity_is_sustained(seed: int, slots: int, load: float) -> None:
    flow = queue(load * slots, slots, 1.0, 400, seed, warmup=4 * slots)
    verdict = judge(evidence(flow))
    assert verdict.sustained is True, verdict


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.sampled_from([1, 8, 64]), st.floats(1.25, 5.0))
def test_above_capacity_is_not(seed: int, slots: int, load: float) -> None:
    flow = queue(load * slots, slots, 1.0, 400, seed)
    verdict = judge(evidence(flow))
    assert verdict.sustained is False
    assert "backlog grew" in verdict.reason


@pytest.mark.parametrize("load", [0.95, 1.05])
def test_at_5_percent_precision_most_points_5_percent_off_are_told_right(load: float) -> None:
    verdicts = [judge(evidence(queue(load * 8, 8, 1.0, 1600, seed))).sustained for seed in range(40)]
    assert verdicts.count(load < 1) >= 36


def test_what_came_just_before_the_end_is_not_owed_yet() -> None:
    arrivals = np.array([0.0, 1.0, 2.0, 8.9, 9.2, 9.5])
    flow = Flow(arrivals, arrivals + 1.2, 0.0, 10.0)
    assert flow.completed() == 3
    assert judge(evidence(flow, fastest_s=1.2)).sustained is True
    late = Flow(arrivals, np.array([1.2, 12.0, 13.0, 14.0, 15.0, 16.0]), 0.0, 10.0)
    verdict = judge(evidence(late, fastest_s=0.0))
    assert verdict.sustained is False
    assert "1 of 6 due requests" in verdict.reason


def test_each_rule_breaks_alone() -> None:
    flow = queue(4.0, 8, 1.0, 400, 3)
    assert judge(evidence(flow)).sustained is True
    preempted = judge(evidence(flow, server=WindowState(preemptions=2)))
    assert (preempted.sustained, preempted.binding, preempted.reason) == (False, "KV cache", "2 preemptions")
    failed = judge(evidence(flow, failed={"http 429": 3}))
    assert failed.sustained is False
    assert "3 http 429" in failed.reason
    slow = judge(evidence(flow, limits={"ttft_p99_ms": (2100.0, 2000.0)}))
    assert (slow.sustained, slow.binding) == (False, "latency limit")
    assert judge(evidence(flow, limits={"ttft_p99_ms": (float("nan"), 2000.0)})).sustained is False
    assert judge(evidence(flow, limits={"ttft_p99_ms": (1900.0, 2000.0)})).sustained is True
    assert judge(evidence(flow, cut="backlog grew by 90 in 3 s")).sustained is False


def test_without_a_preemption_counter_the_reason_says_so() -> None:
    verdict = judge(evidence(queue(4.0, 8, 1.0, 400, 3), server=WindowState()))
    assert verdict.sustained is True
    assert "no preemption counter" in verdict.reason


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"client_fault": "used 99% of its core"}, "load generator was the bottleneck"),
        ({"load_fault": "generator h:1 was lost"}, "generator h:1 was lost"),
        ({"load_fault": "generator h:1 was lost", "client_fault": "sent late"}, "generator h:1 was lost"),
        ({"missed_lengths": 5}, "5 of 400 outputs did not have the requested length"),
        ({"requests": 0}, "no request was due within the window"),
        ({"cut": "time"}, "before its window was over"),
        ({"failed": {"connection": 400}}, "no request reached the server"),
    ],
)
def test_points_that_say_nothing_are_invalid_not_slow(fields: dict[str, object], words: str) -> None:
    verdict = judge(evidence(queue(40.0, 8, 1.0, 400, 3), **fields))
    assert (verdict.valid, verdict.sustained) == (False, None)
    assert words in verdict.reason


def test_what_binds() -> None:
    assert binding(WindowState(preemptions=1)) == "KV cache"
    assert binding(WindowState(kv_use_max=0.98, waiting_max=3)) == "KV cache"
    assert binding(WindowState(kv_use_max=0.98, waiting_max=0, slots_full=True)) == "batch slots"
    assert binding(WindowState(kv_use_max=0.5, waiting_max=9)) == "compute"


def test_overload_is_seen_early_and_a_ramp_is_not_overload() -> None:
    # 20 requests/s at a server that does 10: by 10 s the backlog has grown by 100.
    assert "backlog grew by 100" in overload((20, 120), 10.0, 20.0, 1.0, None)
    assert overload((20, 120), 10.0, 20.0, 1.0, (0.0, 1.0)) == ""  # nothing waits: it still fills up
    assert overload((20, 120), 10.0, 20.0, 1.0, (0.0, 90.0)) != ""
    assert overload((20, 120), 0.5, 20.0, 1.0, None) == ""  # not one latency has passed
    assert overload((20, 30), 10.0, 20.0, 1.0, None) == ""


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_tolerance_never_falls_with_more_requests(count: float, in_flight: float) -> None:
    assert tolerance(count, in_flight) >= 2
    assert tolerance(count + 1, in_flight) >= tolerance(count, in_flight)
    assert tolerance(count, in_flight + 1) >= tolerance(count, in_flight)


def demo_latencies(rising: bool) -> tuple[Flow, WindowLatencies]:
    """14 requests at 1.32 req/s beside busy neighbors: TTFT about 8.9 s, a backlog of 12 to 15 requests."""
    arrivals = np.arange(-12.0, 25.0) / 1.32
    wait = 8.9 + (0.6 * arrivals if rising else 3.0 * np.sin(np.arange(len(arrivals)) * 2.1))
    flow = Flow(arrivals, np.sort(arrivals + wait + 1.5), 0.0, 14 / 1.32)
    inside = (arrivals >= 0) & (arrivals < 14 / 1.32)
    return flow, WindowLatencies(arrivals[inside], wait[inside], wait[inside] + 1.5)


@pytest.mark.parametrize(
    ("value", "text"), [(0.23, "0.23"), (2.16, "2.2"), (36.4, "36"), (134.1, "134"), (2040, "2040")]
)
def test_counts_in_reasons_are_plain_numbers(value: float, text: str) -> None:
    assert plain_count(value) == text


def test_a_window_whose_tolerance_is_as_large_as_an_overload_is_undecided() -> None:
    flow, latencies = demo_latencies(rising=False)
    verdict = judge(evidence(flow, latencies=latencies))
    assert (verdict.valid, verdict.sustained, verdict.name) == (True, None, "undecided")
    assert verdict.noise > 8, "as in the window that once said sustained"
    assert "the window of 10.6 s is shorter than a typical request" in verdict.reason
    longer = Flow(flow.arrivals_s, flow.completions_s, -4.0, 14 / 1.32)
    assert "too few requests (19)" in judge(evidence(longer, latencies=latencies)).reason


def test_ttft_that_climbs_through_the_window_is_overload_whatever_the_backlog_tells() -> None:
    flow, latencies = demo_latencies(rising=True)
    verdict = judge(evidence(flow, latencies=latencies))
    assert verdict.sustained is False
    assert verdict.ttft_trend == pytest.approx(0.6)
    assert "TTFT grew" in verdict.reason or "backlog grew" in verdict.reason


def test_a_window_shorter_than_its_requests_is_undecided() -> None:
    arrivals = np.arange(400) / 40.0
    flow = Flow(arrivals, arrivals + 20.0, 0.0, 10.0)
    latencies = WindowLatencies(arrivals, np.full(400, 19.0), np.full(400, 20.0))
    verdict = judge(evidence(flow, latencies=latencies))
    assert verdict.sustained is not True


@pytest.mark.parametrize("kind", ["steady", "noisy", "exponential", "bursts"])
@pytest.mark.parametrize("requests", [14, 24, 100, 400])
def test_overload_is_hardly_ever_called_sustained(kind: str, requests: int) -> None:
    wrong = sum(verdict_of(kind, 8, 1.25, requests, seed).sustained is True for seed in range(20))
    assert wrong <= 1


def test_half_of_the_capacity_is_called_sustained_in_whole_windows() -> None:
    for kind in KINDS:
        right = sum(verdict_of(kind, 8, 0.5, 400, seed).sustained is True for seed in range(20))
        assert right >= 18, kind


def test_latencies_leave_the_lengths_of_answers_out() -> None:
    rows = [
        plain_request(intended_s=i, asked_output_tokens=n, chunk_gaps_s=[0.1] * (n - 1), chunk_tokens=[1] * n)
        for i, n in enumerate([2, 20, 5, 13])
    ]
    silent: dict[str, object] = {"ttft_s": None, "e2e_s": None, "chunk_gaps_s": [], "chunk_tokens": []}
    latencies = window_latencies([*rows, plain_request(intended_s=4.0, status="cut short", **silent)], 10.0)
    assert latencies.ttft_s.tolist() == pytest.approx([0.1] * 4 + [6.0])
    assert latencies.latency_s[:4].tolist() == pytest.approx([latencies.latency_s[0]] * 4)
