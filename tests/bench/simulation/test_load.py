"""Loads in virtual time: when requests are sent, when a load ends, and what its records say."""

import numpy as np
import pytest

from bench.loadgen import Observer
from bench.simulation import SimulatedServer
from bench.workloads.base import RequestSpec
from tests.simulated_server import REQUEST_S, simulation

EVER = (0.0, float("inf"))


class Watcher:
    """Keeps what it was called with; ends the load at a time."""

    def __init__(self, until_s: float = float("inf")):
        self.until_s = until_s
        self.calls: list[tuple[float, int, int, int, int]] = []

    def tick(self, now_s: float, sent: int, first_token: int, finished: int, failed: int) -> bool:
        self.calls.append((now_s, sent, first_token, finished, failed))
        return now_s < self.until_s


def specs(count: int, output: int = 20, prompt: int = 50) -> list[RequestSpec]:
    rng = np.random.default_rng(5)
    return [RequestSpec(prompt, output, prompt_ids=rng.integers(0, 1000, prompt).tolist()) for _ in range(count)]


def server(**options: object) -> SimulatedServer:
    return SimulatedServer(simulation(**options), "H100")  # type: ignore[arg-type]


def open_loop(under_test: SimulatedServer, requests: list[RequestSpec], times: list[float], **options: object):  # type: ignore[no-untyped-def]
    watcher: Observer = options.pop("observer", Watcher())  # type: ignore[assignment]
    return under_test.run_load(requests, np.array(times), observer=watcher, **{"time_limit_s": 100.0} | options)


def test_requests_are_sent_at_their_times_on_the_servers_clock() -> None:
    under_test, times = server(), [0.0, 0.013, 0.5, 0.5, 2.0]
    under_test.sleep(3.0)  # time 0 of the load is not that of the server
    recording = open_loop(under_test, specs(5), times)
    records = recording.records((0.1, 1.0))
    assert [r.intended_s for r in records] == pytest.approx(times)
    assert [r.sent_s for r in records] == [r.intended_s for r in records]
    assert [r.in_window for r in records] == [False, False, True, True, False]
    assert not recording.cut_short
    assert not recording.health.saturated
    for record in records:
        assert (record.status, record.output_tokens, record.input_tokens) == ("ok", 20, 50)
        assert record.ttft_s is not None
        assert record.e2e_s is not None
        assert REQUEST_S < record.ttft_s < REQUEST_S + 0.05
        assert record.e2e_s == pytest.approx(record.ttft_s + record.decode_s)
        assert list(record.chunk_tokens) == [1] * 20
        assert len(record.chunk_gaps_s) == 19


def test_the_load_ends_with_the_last_request_that_is_needed() -> None:
    under_test, watcher = server(), Watcher()
    requests = [*specs(1, output=5), *specs(1, output=3000), *specs(2)]
    recording = open_loop(under_test, requests, [0.0, 0.01, 0.02, 90.0], needed=1, observer=watcher)
    first, second, third = recording.records(EVER)
    assert [r.status for r in (first, second, third)] == ["ok", "cut short", "cut short"]
    assert recording.cut_short
    assert second.e2e_s is None
    assert 0 < second.output_tokens == len(second.chunk_gaps_s) + 1 < 3000
    assert watcher.calls[-1][1:] == (3, 3, 1, 0)
    running, waiting = under_test.open_reader().read().running, under_test.open_reader().read().waiting
    assert (running, waiting) == (0, 0)


def test_the_observer_sees_time_pass_and_may_end_the_load() -> None:
    under_test, watcher = server(), Watcher(until_s=0.55)
    recording = open_loop(under_test, specs(100, output=1000), [i / 50 for i in range(100)], observer=watcher)
    times = [call[0] for call in watcher.calls]
    assert times == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.6])
    assert [call[1] for call in watcher.calls] == [1, 11, 21, 31, 31]
    assert len(recording.records(EVER)) == 31
    assert recording.cut_short


def test_the_time_limit_ends_the_load() -> None:
    under_test = server()
    recording = open_loop(under_test, specs(2, output=4000), [0.0, 50.0], time_limit_s=1.25)
    assert under_test.now() == pytest.approx(1.25)
    assert [r.status for r in recording.records(EVER)] == ["cut short"]


def test_a_closed_loop_keeps_its_requests_open() -> None:
    under_test, watcher = server(), Watcher()
    recording = under_test.run_closed_loop(specs(40), 8, observer=watcher, time_limit_s=100.0, chunks_per_s=1.0)
    records = recording.records(EVER)
    assert [r.status for r in records] == ["ok"] * 40
    sent = np.array([r.intended_s for r in records])
    ends = np.array([r.intended_s + (r.e2e_s or 0) for r in records])
    for at in np.linspace(0.01, sent.max(), 50):
        assert ((sent <= at) & (ends > at)).sum() == 8
    assert not recording.cut_short


def test_readings_are_taken_twice_a_second() -> None:
    under_test = server()
    with under_test.open_reader() as reader:
        under_test.sleep(0.3)
        reader.clear()
        open_loop(under_test, specs(40, output=400), [i / 20 for i in range(40)])
        reader.started_at = 0.3
        states = reader.readings()
    assert [s.at_s for s in states[:6]] == pytest.approx([-0.3, 0.0, 0.5, 1.0, 1.5, 2.0])
    assert [s.running for s in states[1:4]] == [0, 10, 20]
    assert 0 < (states[3].kv_use or 0) < 1


def test_a_request_that_cannot_be_served_fails_as_over_http() -> None:
    recording = open_loop(server(), [*specs(1, prompt=5000), *specs(1)], [0.0, 0.1])
    refused, served = recording.records(EVER)
    assert (refused.status, served.status) == ("http 400", "ok")
    assert "5000 tokens" in refused.error
    assert refused.ttft_s is None


@pytest.mark.parametrize("closed", [False, True])
def test_outputs_that_the_longest_length_cuts_are_told(closed: bool) -> None:
    under_test, requests = server(), [*specs(2, output=20), *specs(1, output=5000), *specs(1, output=6000)]
    if closed:
        recording = under_test.run_closed_loop(
            requests, 4, observer=Watcher(), time_limit_s=1000.0, chunks_per_s=1.0
        )  # fmt: skip
    else:
        recording = open_loop(under_test, requests, [0.0, 0.1, 0.2, 0.3], time_limit_s=1000.0)
    records = recording.records(EVER)
    assert [record.status for record in records] == ["ok"] * 4
    assert [record.output_tokens for record in records] == [20, 20, 4046, 4046]
    cut = "the output was cut at --max-model-len 4096"
    assert [record.error for record in records] == ["", "", cut, cut]
    assert under_test.note == "2 outputs were cut at --max-model-len 4096: raise it behind --"
    open_loop(under_test, specs(1), [0.0])
    assert under_test.note.startswith("2 outputs")
    assert server().note == ""
