import pytest

from bench.measurement.load_point import LoadPoint, PointPlan, PointState, Watch, drain, point_id
from bench.measurement.server import HttpServer
from bench.search.windows import Timing
from bench.target import Target
from bench.target.metrics import MetricsReader, ServerState
from bench.workloads import make_workload

pytestmark = pytest.mark.usefixtures("patient_generator")

TIMING = Timing(warmup_s=1.0, window_s=10.0, drain_s=5.0)


def plan(**fields: object) -> PointPlan:
    plain: dict[str, object] = {
        "rate": 20.0, "phase": "search", "repeat": 0, "timing": TIMING, "latency_s": 1.0, "cut_overload": True,
    }  # fmt: skip
    return PointPlan(**(plain | fields))  # type: ignore[arg-type]


def watch(states: list[PointState] | None = None, left_s: float = 100.0, **fields: object) -> Watch:
    reader = MetricsReader("http://127.0.0.1:9")  # never asked: its readings are put in by hand
    seen = states if states is not None else []
    return Watch(plan(**fields), reader, seen.append, lambda: left_s)


def test_overload_ends_a_search_point_early() -> None:
    w = watch()
    for second in range(1, 4):
        assert w.tick(float(second), 20 * second, 0, 10 * second, 0)
    assert not w.tick(9.0, 20 * 30, 0, 90, 0)
    assert "backlog grew" in w.cut


def test_a_search_point_with_a_long_queue_does_not_wait_for_its_last_answers() -> None:
    w = watch()
    w.tick(1.0, 20, 0, 10, 0)
    assert w.tick(10.9, 200, 0, 165, 0)
    assert w.tick(11.1, 220, 0, 185, 0)  # 25 more than at the start: within noise
    assert not w.tick(11.3, 225, 0, 150, 0)


def test_a_ladder_point_goes_on_past_the_knee() -> None:
    w = watch(cut_overload=False)
    assert all(w.tick(t, round(200 * t), 0, 0, 0) for t in (1.0, 5.0, 9.0))


def test_a_preemption_in_the_window_ends_a_search_point_and_one_before_it_does_not() -> None:
    w = watch()
    now = [1000.5]
    w.clock = lambda: now[0]
    w.tick(0.5, 5, 0, 0, 0)
    w.reader.states += [ServerState(1000 + t, preemptions=p) for t, p in ((0.2, 0), (0.9, 1), (1.4, 1))]
    now[0] = 1002.0
    assert w.tick(2.0, 20, 0, 10, 0)
    w.reader.states.append(ServerState(1002.5, preemptions=2))
    now[0] = 1003.0
    assert not w.tick(3.0, 40, 0, 30, 0)
    assert w.cut == "preempted"


def test_time_out_and_a_dead_server_end_any_point() -> None:
    assert watch(left_s=0.0, cut_overload=False).tick(0.1, 0, 0, 0, 0) is False
    w = watch(cut_overload=False)
    w.reader.failures = 6
    assert w.tick(3.0, 10, 0, 10, 0)
    assert not w.tick(3.2, 11, 0, 10, 1)
    assert w.cut == "the server stopped answering"


def test_progress_is_shown_at_every_tick() -> None:
    states: list[PointState] = []
    w = watch(states)
    w.tick(0.2, 3, 2, 1, 0)
    assert [(s.sent, s.first_token, s.finished, s.server) for s in states] == [(3, 2, 1, None)]


def test_a_point_against_a_real_queue(queue_server) -> None:  # type: ignore[no-untyped-def]
    server = queue_server("--slots", "4", "--service", "0.1")
    workload = make_workload({"kind": "random", "input": 20, "output": 5}, 1000)
    with MetricsReader(server.base_url) as reader:
        point = LoadPoint(HttpServer(Target(server.base_url, "stub")), workload, "c", reader, 0, 0.2, lambda: 60.0)
        easy = plan(rate=20.0, phase="fixed", timing=Timing(0.3, 2.0, 5.0), latency_s=0.1)
        row, requests, _ = point.run(easy, lambda _: None)
        assert (row.valid, row.sustained, row.preemptions, row.failed) == (True, True, 0, 0)
        assert row.requests == 40
        assert sum(r.in_window for r in requests) == 40
        after = [r for r in requests if r.intended_s >= 2.3]
        assert after  # the load was kept up until the last answer of the window
        assert all(r.status == "ok" for r in requests if r.in_window)
        assert max(r.intended_s for r in after) < 3.3
        assert row.completed == pytest.approx(40, abs=8)
        assert row.output_tok_s == pytest.approx(100, rel=0.15)
        assert row.tpot_p50_ms == pytest.approx(20, rel=0.3)
        assert row.window_s == pytest.approx(2.0)
        assert row.running_max is not None
        assert 1 <= row.running_max <= 4
        assert row.provisional  # 20 % asks for 100 requests
        again, *_ = point.run(plan(rate=20.0, phase="fixed", repeat=1, timing=Timing(0.3, 1.0, 5.0)), lambda _: None)
        assert again.seed != row.seed
        hard = plan(rate=100.0, timing=Timing(0.3, 6.0, 5.0), latency_s=0.1)
        over, cut, _ = point.run(hard, lambda _: None)
        assert (over.valid, over.sustained) == (True, False)
        assert over.binding in ("batch slots", "compute")  # cut so early, it may have one reading of the server only
        assert over.window_s < 5.0  # cut short
        assert any(r.status == "cut short" for r in cut)
        assert drain(reader, 1.0, HttpServer(Target(server.base_url, "stub")))
        state = reader.latest
        assert state is not None
        assert (state.running, state.waiting) == (0, 0)


def test_ids_name_files_and_tell_runs_apart() -> None:
    runs = [(rate, repeat) for rate in (1.5, 2.25) for repeat in (0, 1)]
    names = [point_id("prefix caching: on", "500/2000", "search", rate, repeat) for rate, repeat in runs]
    assert names[0] == "prefix-caching-on_500-2000_search-1.5"
    assert len(set(names)) == 4
    assert all("/" not in name and " " not in name for name in names)
