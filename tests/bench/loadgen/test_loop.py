"""The load generator against a server in a process of its own that logs what it truly sent."""

import gc
import json
import select
import socket
import ssl
import time
from typing import Any

import numpy as np
import pytest

from bench.errors import BenchError
from bench.loadgen import connection, poller, run_load
from bench.loadgen.job import LEAD_NS, OPEN_EACH_NS, Job
from bench.loadgen.request import Address
from bench.target import Target
from bench.workloads import RequestSpec

EVER = (0.0, float("inf"))
# Between the server's note "I send now" and the send itself lies whatever a busy machine puts there.
SLACK_S = 0.25


class Quiet:
    def tick(self, now_s: float, sent: int, first_token: int, finished: int, failed: int) -> bool:
        return True


class StopWhen:
    """Ends the point once a condition over (sent, first_token, finished, failed) holds."""

    def __init__(self, condition: Any):
        self.condition = condition
        self.calls: list[tuple[float, int, int, int, int]] = []

    def tick(self, now_s: float, sent: int, first_token: int, finished: int, failed: int) -> bool:
        self.calls.append((now_s, sent, first_token, finished, failed))
        return not self.condition(sent, first_token, finished, failed)


def true_gaps(entry: dict[str, Any], chunks: int) -> np.ndarray:
    return np.diff(entry["chunks_ns"][:chunks]) / 1e9


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_reports_what_was_sent(known_server: Any, framing: str) -> None:
    tokens = [5, 6, 7, 8, 9, 10]
    times = [0.0, 0.05, 0.1, 0.1, 0.1, 0.2]
    recording = known_server.run(tokens, times, framing=framing, ttft=0.05, itl=0.03)
    log = known_server.sent(len(tokens))
    rows = recording.records((0.1, 0.2))
    assert [row.status for row in rows] == ["ok"] * 6
    assert [row.in_window for row in rows] == [False, False, True, True, True, False]
    assert recording.requested == recording.sent == 6
    assert not recording.cut_short
    for row, count, moment in zip(rows, tokens, times, strict=True):
        entry = log[count]
        assert row.intended_s == pytest.approx(moment, abs=1e-6)
        assert row.sent_s >= row.intended_s
        assert row.chunk_tokens == [1] * count
        assert (row.input_tokens, row.asked_output_tokens, row.output_tokens, row.cached_tokens) == (5, count, count, 3)
        assert row.chunk_gaps_s == pytest.approx(true_gaps(entry, count).tolist(), abs=SLACK_S)
        true_ttft = (entry["chunks_ns"][0] - entry["received_ns"]) / 1e9
        assert row.ttft_s is not None
        assert row.ttft_s >= true_ttft
        assert row.e2e_s == pytest.approx(row.ttft_s + sum(row.chunk_gaps_s))


def test_request_on_the_wire(known_server: Any) -> None:
    known_server.run([3])
    known_server.run([4], chat=True)
    log = known_server.sent(2)
    head, body = log[3]["headers"], log[3]["body"]
    assert head.startswith("POST /v1/completions HTTP/1.1\r\n")
    assert "Authorization: Bearer key" in head
    assert body["prompt"] == [7, 8, 9, 10, 11]
    assert (body["max_tokens"], body["temperature"], body["ignore_eos"], body["stream"]) == (3, 0.0, True, True)
    assert body["stream_options"] == {"include_usage": True}
    assert log[4]["headers"].startswith("POST /v1/chat/completions HTTP/1.1\r\n")
    assert log[4]["body"]["messages"] == [{"role": "user", "content": "hi"}]


def test_chat_stream(known_server: Any) -> None:
    (row,) = known_server.run([6], chat=True, itl=0.01).records(EVER)
    assert (row.status, row.chunk_tokens, row.output_tokens) == ("ok", [1] * 6, 6)


def test_a_stall_is_seen_as_long_as_it_was(known_server: Any) -> None:
    tokens = [11, 12, 13]
    rows = known_server.run(tokens, itl=0.02, stall_after=4, stall_s=0.52).records(EVER)
    log = known_server.sent(3)
    for row, count in zip(rows, tokens, strict=True):
        gaps = true_gaps(log[count], count)
        assert int(np.argmax(row.chunk_gaps_s)) == int(np.argmax(gaps)) == 3
        assert row.chunk_gaps_s[3] == pytest.approx(gaps[3], abs=SLACK_S)
        assert row.chunk_gaps_s[3] > 0.4


@pytest.mark.parametrize("logprobs", [False, True])
def test_chunks_of_several_tokens(known_server: Any, logprobs: bool) -> None:
    (row,) = known_server.run([10], per_chunk=4, itl=0.01, logprobs=logprobs).records(EVER)
    assert row.chunk_tokens == [4, 4, 2]
    assert len(row.chunk_gaps_s) == 2
    assert row.output_tokens == 10


def test_events_in_two_pieces_arrive_with_the_second(known_server: Any) -> None:
    (row,) = known_server.run([6], split=True, itl=0.03).records(EVER)
    entry = known_server.sent(1)[6]
    assert (row.status, row.chunk_tokens) == ("ok", [1] * 6)
    assert row.chunk_gaps_s == pytest.approx(true_gaps(entry, 6).tolist(), abs=SLACK_S)


@pytest.mark.parametrize("status", [429, 500])
def test_refusals_carry_status_and_message(known_server: Any, status: int) -> None:
    rows = known_server.run([3, 4], status=status).records(EVER)
    assert [(row.status, row.error) for row in rows] == [(f"http {status}", "the stub says no")] * 2
    assert [(row.ttft_s, row.e2e_s, row.output_tokens) for row in rows] == [(None, None, 0)] * 2


@pytest.mark.parametrize(
    ("fault", "status", "error"),
    [
        ("close", "connection", "the server closed the connection in the middle of the response"),
        ("garbage event", "malformed stream", "an event of the stream cannot be parsed: {not json"),
        ("garbage chunk", "malformed stream", "the chunks of the response are not framed as HTTP requires"),
        ("error event", "stream error", "the engine died"),
    ],
)
def test_broken_streams_keep_what_came_before(known_server: Any, fault: str, status: str, error: str) -> None:
    (row,) = known_server.run([9], itl=0.01, fault=fault, fault_after=3).records(EVER)
    assert row.status == status
    assert row.error in (error, "connection reset by peer")
    assert row.ttft_s is not None
    assert row.e2e_s is None
    assert row.chunk_tokens == [1, 1, 1]
    assert row.output_tokens == 3


def test_not_http(known_server: Any) -> None:
    (row,) = known_server.run([3], fault="garbage head").records(EVER)
    assert (row.status, row.error) == ("malformed stream", "the server did not answer in HTTP")


def test_an_answer_that_is_done_but_does_not_end(known_server: Any) -> None:
    recording = known_server.run([4], fault="no end")
    (row,) = recording.records(EVER)
    assert (row.status, row.output_tokens, recording.cut_short) == ("ok", 4, False)


def test_connection_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    target = Target(f"http://127.0.0.1:{port}", "m")
    specs = [RequestSpec(1, 4, prompt_ids=[1]) for _ in range(3)]
    watch = StopWhen(lambda *_: False)
    recording = run_load(target, specs, np.array([0.0, 0.01, 0.5]), observer=watch, time_limit_s=30)
    rows = recording.records(EVER)
    assert [(row.status, row.error) for row in rows] == [("connection", "connection refused")] * 3
    assert watch.calls[-1][1:] == (0, 0, 0, 3)
    assert recording.sent == 0


def test_unknown_host() -> None:
    with pytest.raises(BenchError, match=r"no-such-host\.invalid.*--url"):
        run_load(Target("http://no-such-host.invalid:1", "m"), [], np.array([]), observer=Quiet(), time_limit_s=1)


def test_few_connections_to_this_machine_need_little_lead() -> None:
    near, far = (Address("h", 1, "", None, socket.AF_INET, (ip, 1)) for ip in ("127.0.0.1", "192.0.2.1"))
    moments = [0, 100_000_000, 200_000_000, 220_000_000, 9_000_000_000]
    assert Job(near, [b""] * 5, moments, 1.0, 5).lead_ns < LEAD_NS / 5
    assert Job(near, [b""] * 6, [0, *moments], 1.0, 6).lead_ns == LEAD_NS
    assert Job(near, [b""] * 9, [], 1.0, 9, concurrency=9).lead_ns == LEAD_NS + 9 * OPEN_EACH_NS
    assert Job(far, [b""], [0], 1.0, 1).lead_ns == LEAD_NS
    tls = Address("h", 1, "", ssl.create_default_context(), socket.AF_INET6, ("::1", 1, 0, 0))
    assert Job(tls, [b""], [0], 1.0, 1).lead_ns == LEAD_NS


def test_the_first_sends_are_in_time(known_server: Any) -> None:
    """With as little lead as there is, every connection stands before its request is due."""
    rows = known_server.run([2] * 4).records(EVER)
    assert len(rows) == 4
    assert max(row.sent_s - row.intended_s for row in rows) < SLACK_S


def test_nothing_to_send(known_server: Any) -> None:
    recording = known_server.run([])
    assert recording.records(EVER) == []
    assert not recording.health.saturated


def test_observer_cuts_short_and_keeps_what_was_measured(known_server: Any) -> None:
    watch = StopWhen(lambda sent, first, finished, failed: finished == 1 and first == 2)
    target = Target(known_server.url, json.dumps({"fault": "hang", "fault_after": 7}))
    specs = [RequestSpec(1, count, prompt_ids=[1]) for count in (4, 9, 9)]  # the first one ends before its fault
    recording = run_load(target, specs, np.array([0.0, 0.0, 300.0]), observer=watch, time_limit_s=60)
    rows = recording.records(EVER)
    assert recording.cut_short
    assert [row.status for row in rows] == ["ok", "cut short"]
    assert rows[1].chunk_tokens == [1] * 7
    assert (recording.requested, recording.sent) == (3, 2)


def test_time_limit_cuts_short(known_server: Any) -> None:
    recording = known_server.run([5, 6], [0.0, 100.0], fault="hang", time_limit_s=0.5)
    assert recording.cut_short
    assert [row.status for row in recording.records(EVER)] == ["cut short"]


def test_observer_sees_counts(known_server: Any) -> None:
    watch = StopWhen(lambda *_: False)
    known_server.run([4, 5, 6], [0.0, 0.3, 0.6], watcher=watch, itl=0.05)
    sents = [call[1] for call in watch.calls]
    assert sents == sorted(sents)
    assert watch.calls[-1][1:] == (3, 3, 3, 0)
    assert len(watch.calls) >= 3


def test_a_slow_generator_reports_itself(known_server: Any) -> None:
    class Sleepy(Quiet):
        def tick(self, now_s: float, sent: int, first_token: int, finished: int, failed: int) -> bool:
            time.sleep(0.3)
            return True

    times = [0.02 * i for i in range(40)]
    health = known_server.run([3] * 40, times, watcher=Sleepy()).health
    assert health.saturated
    assert health.lateness_p99_s > 0.1
    assert "sent requests" in health.reason
    assert "late (P99)" in health.reason


def test_kernel_stamps_survive_a_late_reader(known_server: Any) -> None:
    """The loop sleeps over arrivals that are 0.6 s apart: their gaps must not shrink or grow by its sleep."""

    class Sleepy(Quiet):
        def tick(self, now_s: float, sent: int, first_token: int, finished: int, failed: int) -> bool:
            time.sleep(0.4)
            return True

    recording = known_server.run([5], itl=0.6, watcher=Sleepy())
    (row,) = recording.records(EVER)
    gaps = true_gaps(known_server.sent(1)[5], 5)
    if recording.health.loop_lag_p99_s == 0:
        pytest.skip("this system gives no kernel stamps")
    assert row.chunk_gaps_s == pytest.approx(gaps.tolist(), abs=0.15)
    assert recording.health.loop_lag_p99_s > 0.1


def test_reads_of_several_chunks_are_counted(known_server: Any) -> None:
    recording = known_server.run([200])  # all at once
    (row,) = recording.records(EVER)
    assert (row.status, row.output_tokens, len(row.chunk_tokens)) == ("ok", 200, 200)
    assert recording.health.coalesced_reads >= 1


@pytest.mark.parametrize("missing", ["epoll", "timer", "stamps"])
def test_systems_that_lack_something(known_server: Any, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    if missing == "epoll":
        monkeypatch.delattr(select, "epoll", raising=False)
    elif missing == "timer":
        monkeypatch.setattr(poller, "_open_timer", lambda: (None, -1))
    else:
        monkeypatch.setattr(connection, "_ANCILLARY_BYTES", 0)
    recording = known_server.run([5, 6], [0.0, 0.1], itl=0.01)
    rows = recording.records(EVER)
    assert [(row.status, row.chunk_tokens) for row in rows] == [("ok", [1] * 5), ("ok", [1] * 6)]
    assert all(row.sent_s >= row.intended_s for row in rows)


def test_many_streams_and_the_collector_is_back(known_server: Any) -> None:
    assert gc.isenabled()
    tokens = list(range(10, 138))
    rows = known_server.run(tokens, [i / 400 for i in range(128)], itl=0.002).records(EVER)
    assert [row.status for row in rows] == ["ok"] * 128
    assert [row.output_tokens for row in rows] == tokens
    assert gc.isenabled()


def test_long_requests_leave_in_pieces(known_server: Any) -> None:
    ids = list(range(100_000, 700_000))  # beyond what a socket's buffer takes at once
    target = Target(known_server.url, json.dumps({}))
    spec = RequestSpec(len(ids), 3, prompt_ids=ids)
    (row,) = run_load(target, [spec], np.zeros(1), observer=Quiet(), time_limit_s=60).records(EVER)
    assert (row.status, row.input_tokens) == ("ok", len(ids))


def test_tls(tls_server: Any) -> None:
    tokens = [5, 6, 300]
    rows = tls_server.run(tokens, itl=0.001).records(EVER)
    assert [(row.status, row.output_tokens) for row in rows] == [("ok", count) for count in tokens]


def test_tls_certificate_is_checked(tls_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    (row,) = tls_server.run([5]).records(EVER)
    assert row.status == "connection"
    assert "certificate" in row.error
