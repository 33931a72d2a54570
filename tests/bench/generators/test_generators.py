"""Loads of several generators against a server that logs what it truly sent: the schedule and the record of one."""

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bench.errors import BenchError
from bench.generators import Generators, LostGeneratorError, Waiting, clocks, remote, session
from bench.generators import generators as module
from bench.generators.clocks import RoundTrip
from bench.generators.listener import Listener
from bench.generators.messages import Recorded
from bench.loadgen import Recording, run_closed_loop, run_load
from bench.loadgen.response import read_head
from bench.loadgen.stream import Stream
from bench.results import RequestRecord
from bench.target import Target
from bench.workloads import RequestSpec
from bench.workloads.arrivals import Arrivals
from tests.bench.generators.process import TOKEN, GeneratorProcess

pytestmark = pytest.mark.usefixtures("patient_generator", "patient_clocks")

EVER = (-1.0, float("inf"))
SLACK_S = 5.0  # of a busy machine

Connect = Callable[..., Generators]


class Counting:
    """An observer that may end the load."""

    def __init__(self, until: Callable[[int, int, int, int], bool] = lambda *_: False):
        self.until = until
        self.last = (0, 0, 0, 0)

    def tick(self, now_s: float, sent: int, first_token: int, finished: int, failed: int) -> bool:
        self.last = (sent, first_token, finished, failed)
        return not self.until(sent, first_token, finished, failed)


def specs(count: int, least: int = 3) -> list[RequestSpec]:
    """Requests that are told apart by their lengths, as the server's log does."""
    return [RequestSpec(2, least + number, prompt_ids=[number, 7]) for number in range(count)]


def bits(rows: list[RequestRecord]) -> list[tuple[int, bytes, int]]:
    """The schedule of a recording, with the times to the last bit."""
    return [(row.index, struct.pack("d", row.intended_s), row.asked_output_tokens) for row in rows]


def test_several_generators_send_the_schedule_of_one(known_server: Any, generators: Connect) -> None:
    target = Target(known_server.url, json.dumps({"ttft": 0.02, "itl": 0.002}), api_key="key")
    requests = specs(24)
    times = Arrivals("gamma", 0.5).schedule(40.0, (0.6,), seed=3)
    assert len(times) == 24
    runs = {"here": run_load} | {str(count): generators(count, seed=5).run_load for count in (1, 2, 3)}
    found: dict[str, list[Any]] = {}
    for number, (name, run) in enumerate(runs.items(), 1):
        watch = Counting()
        recording = run(target, requests, times, observer=watch, time_limit_s=60)
        rows = recording.records(EVER)
        assert [(r.index, r.status, r.output_tokens) for r in rows] == [(i, "ok", 3 + i) for i in range(24)]
        assert (watch.last, recording.sent, recording.cut_short) == ((24, 24, 24, 0), 24, False)
        log = known_server.sent(24 * number)
        for row in rows:
            entry = log[row.asked_output_tokens]
            true_ttft = (entry["chunks_ns"][0] - entry["received_ns"]) / 1e9
            assert row.ttft_s is not None
            assert true_ttft <= row.ttft_s < true_ttft + SLACK_S
        found[name] = [bits(rows), {key: (entry["headers"], entry["body"]) for key, entry in log.items()}]
        health = recording.health
        assert health.chunks == sum(spec.output_tokens for spec in requests)
        assert (health.fault, health.processes) == ("", max(1, len(health.clocks)))
        assert len(health.clocks) == (0 if name == "here" else int(name))
        assert all(clock.error_s >= abs(clock.drift_s) for clock in health.clocks)
        check_parts(recording, rows)
    assert found["1"] == found["2"] == found["3"] == found["here"]


def check_parts(recording: Recording, rows: list[RequestRecord]) -> None:
    """Each request names its generator, whose share of the load is described."""
    hosts = recording.health.hosts
    owners = {name: {row.index for row in rows if row.generator == name} for name in {row.generator for row in rows}}
    if not hosts:
        assert owners == {"": set(range(24))}
        return
    parts = module.divide(24, len(hosts), 5)
    assert owners == {host.clock.generator: set(part) for host, part in zip(hosts, parts, strict=True)}
    for host, part in zip(hosts, parts, strict=True):
        assert (host.requests, host.sent) == (len(part), len(part))
        assert host.chunks == sum(row.output_tokens for row in rows if row.index in part)
        late = [row.sent_s - row.intended_s for row in rows if row.index in part]
        assert host.lateness_p99_s == pytest.approx(np.percentile(late, 99), abs=1e-6)
        assert host.use is not None
        assert host.use.cpu_s > 0


def test_a_closed_loop_is_divided_too(known_server: Any, generators: Connect) -> None:
    target = Target(known_server.url, json.dumps({"ttft": 0.02, "itl": 0.01}))
    watch = Counting()
    recording = generators(2).run_closed_loop(target, specs(20), 5, observer=watch, time_limit_s=60, chunks_per_s=100.0)
    rows = recording.records(EVER)
    assert [(r.index, r.status, r.output_tokens) for r in rows] == [(i, "ok", 3 + i) for i in range(20)]
    log = known_server.sent(20).values()
    events = sorted([(e["received_ns"], 1) for e in log] + [(e["chunks_ns"][-1], -1) for e in log])
    assert np.cumsum([step for _, step in events]).max() <= 5
    assert watch.last == (20, 20, 20, 0)


def test_fewer_requests_than_generators(known_server: Any, generators: Connect) -> None:
    mine, target = generators(3), Target(known_server.url, json.dumps({}))
    alone = mine.run_load(target, specs(1), np.zeros(1), observer=Counting(), time_limit_s=60)
    assert [r.status for r in alone.records(EVER)] == ["ok"]
    assert len(alone.health.clocks) == 1
    few = mine.run_closed_loop(target, specs(5), 1, observer=Counting(), time_limit_s=60, chunks_per_s=1.0)
    assert [r.status for r in few.records(EVER)] == ["ok"] * 5


def test_all_are_cut_short_together(known_server: Any, generators: Connect) -> None:
    target = Target(known_server.url, json.dumps({"itl": 0.05}))
    watch = Counting(lambda _sent, _first, finished, _failed: finished >= 2)
    times = np.arange(12) * 0.5
    recording = generators(2).run_load(target, specs(12), times, observer=watch, time_limit_s=60)
    assert recording.cut_short
    assert 2 <= sum(r.status == "ok" for r in recording.records(EVER)) < 12
    assert recording.health.fault == ""


def test_the_load_is_kept_up_until_all_awaited_ended(known_server: Any, generators: Connect) -> None:
    target = Target(known_server.url, json.dumps({"itl": 0.1}))
    requests = [RequestSpec(1, tokens, prompt_ids=[1]) for tokens in (12, 2, *[2] * 100)]
    recording = generators(2).run_load(
        target, requests, np.arange(102) * 0.05, observer=Counting(), time_limit_s=60, needed=2
    )
    rows = recording.records(EVER)
    assert recording.cut_short
    assert rows[0].status == "ok"
    owners = {index: number for number, part in enumerate(module.divide(102, 2, 0)) for index in part}
    assert {owners[r.index] for r in rows if r.intended_s > 0.6} == {0, 1}
    assert len(rows) < 60


def test_a_generator_with_several_processes(
    known_server: Any, generators: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "processes_for", lambda _: 2)
    target = Target(known_server.url, json.dumps({"ttft": 0.02, "itl": 0.002}))
    watch = Counting()
    times = np.arange(16) * 0.02
    recording = generators(1).run_load(target, specs(16), times, observer=watch, time_limit_s=60)
    rows = recording.records(EVER)
    assert [(r.index, r.status, r.output_tokens) for r in rows] == [(i, "ok", 3 + i) for i in range(16)]
    assert recording.health.processes == 2
    assert watch.last == (16, 16, 16, 0)


def test_a_killed_generator_makes_the_load_invalid_and_loses_no_other_record(
    known_server: Any,
) -> None:
    target = Target(known_server.url, json.dumps({"itl": 0.01}))
    times = np.arange(200) * 0.05
    with GeneratorProcess() as kept, GeneratorProcess() as lost:
        addresses = [("127.0.0.1", kept.port), ("127.0.0.1", lost.port)]
        mine = Generators(addresses, TOKEN.encode(), seed=1, waiting=Waiting(0.3))
        mine.connect()

        def kill(_sent: int, _first: int, finished: int, _failed: int) -> bool:
            if finished >= 10 and lost.process.poll() is None:
                lost.kill()
            return False

        recording = mine.run_load(target, specs(200), times, observer=Counting(kill), time_limit_s=60)
        parts = module.divide(200, 2, 1)
        assert recording.health.fault == (
            f"generator {lost.address} was lost during the load: it {lost_how(recording)}; what it recorded of its "
            "100 requests is missing"
        )
        rows = recording.records(EVER)
        assert {r.index for r in rows} <= set(parts[0])
        assert sum(r.status == "ok" for r in rows) >= 3
        assert recording.cut_short
        assert [clock.generator for clock in recording.health.clocks] == [kept.address, lost.address]
        with pytest.raises(
            LostGeneratorError, match=f"generator {lost.address} cannot be reached: connection refused for"
        ):
            mine.run_load(target, specs(4), np.zeros(4), observer=Counting(), time_limit_s=60)
        with GeneratorProcess(port=lost.port):  # it is started again: the run goes on
            again = mine.run_load(target, specs(4), np.zeros(4), observer=Counting(), time_limit_s=60)
            assert [r.status for r in again.records(EVER)] == ["ok"] * 4
            mine.close()


def lost_how(recording: Recording) -> str:
    """What the end of a killed process looks like depends on what was on the way."""
    broken = (f"broke the connection ({cause})" for cause in ("connection reset by peer", "broken pipe"))
    return next(how for how in ("closed the connection", *broken) if how in recording.health.fault)


def test_a_generator_that_was_started_anew_between_two_loads_is_used(known_server: Any) -> None:
    target = Target(known_server.url, json.dumps({}))
    first = GeneratorProcess()
    with Generators([("127.0.0.1", first.port)], TOKEN.encode()) as mine:
        mine.connect()
        first.kill()
        with GeneratorProcess(port=first.port) as second:
            recording = mine.run_load(target, specs(2), np.zeros(2), observer=Counting(), time_limit_s=60)
            assert [r.status for r in recording.records(EVER)] == ["ok", "ok"]
            assert mine.pids_here() == [second.process.pid]


def test_one_run_at_a_time(known_server: Any, listeners: Callable[..., list[Listener]], monkeypatch: Any) -> None:
    monkeypatch.setattr(remote, "_BUSY_LIMIT_S", 0.0)
    (listener,) = listeners(1)
    addresses = [("127.0.0.1", listener.port)]
    with Generators(addresses, TOKEN.encode()) as first, Generators(addresses, TOKEN.encode()) as second:
        first.connect()
        with pytest.raises(LostGeneratorError, match=r"refused this run: it generates the load of another run \(127"):
            second.connect()
        first.close()
        monkeypatch.setattr(remote, "_BUSY_LIMIT_S", 10.0)
        second.connect()
        target = Target(known_server.url, json.dumps({}))
        recording = second.run_load(target, specs(2), np.zeros(2), observer=Counting(), time_limit_s=60)
        assert recording.sent == 2


def test_strangers_do_not_keep_a_run_out(known_server: Any, listeners: Callable[..., list[Listener]]) -> None:
    """Some say nothing, some speak another protocol; a run that comes after them is served."""
    (listener,) = listeners(1)
    strangers = [socket.create_connection(("127.0.0.1", listener.port)) for _ in range(8)]
    for stranger in strangers[:4]:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
    with Generators([("127.0.0.1", listener.port)], TOKEN.encode()) as mine:
        mine.connect()
        target = Target(known_server.url, json.dumps({}))
        recording = mine.run_load(target, specs(2), np.zeros(2), observer=Counting(), time_limit_s=60)
        assert recording.sent == 2
        for stranger in strangers[:4]:
            stranger.settimeout(30)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
    for stranger in strangers:
        stranger.close()


def test_what_a_generator_cannot_do_is_said(
    known_server: Any, generators: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, mine = Target(known_server.url, json.dumps({})), generators(2)

    def fail(_: Target) -> None:
        raise BenchError("cannot find the host 'server' here (--url)")

    with monkeypatch.context() as patch:
        patch.setattr(session, "resolve", fail)
        with pytest.raises(BenchError, match=r"generator 127\.0\.0\.1:\d+: cannot find the host 'server' here"):
            mine.run_load(target, specs(4), np.zeros(4), observer=Counting(), time_limit_s=60)
    recording = mine.run_load(target, specs(4), np.zeros(4), observer=Counting(), time_limit_s=60)
    assert recording.sent == 4


def test_servers_that_other_machines_cannot_reach(generators: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = generators(1)
    mine.check(Target("http://127.0.0.1:8000"))
    assert mine.pids_here() == [os.getpid()]
    for place in ("network", "processes"):
        monkeypatch.setattr(module, place, lambda: "another one")
    mine.check(Target("http://192.0.2.1:8000"))
    mine.check(Target("http://server:8000"))
    for url in ("http://127.0.0.1:8000", "http://localhost:8000", "http://[::1]:8000"):
        with pytest.raises(BenchError, match=r"is on another host, which cannot reach http://.*:8000: .*--url"):
            mine.check(Target(url))
    assert mine.pids_here() == []


def test_a_clock_that_is_ahead_changes_no_record(
    known_server: Any, generators: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generator whose clock seems to be ahead by 30 ms begins 30 ms late, and its times are that much earlier."""
    ahead_ns = 30_000_000
    monkeypatch.setattr(remote, "compare", lambda exchange: RoundTrip(0, ahead_ns, ahead_ns, 0))
    target = Target(known_server.url, json.dumps({"ttft": 0.02}))
    times = np.arange(6) * 0.05
    recording = generators(2).run_load(target, specs(6), times, observer=Counting(), time_limit_s=60)
    rows = recording.records(EVER)
    assert [r.intended_s for r in rows] == [round(t * 1e9) / 1e9 for t in times]
    assert all(r.sent_s >= r.intended_s for r in rows)
    log = known_server.sent(6)
    for row in rows:
        entry = log[row.asked_output_tokens]
        true_ttft = (entry["chunks_ns"][0] - entry["received_ns"]) / 1e9
        assert row.ttft_s is not None
        assert true_ttft <= row.ttft_s < true_ttft + SLACK_S
    assert [clock.offset_s for clock in recording.health.clocks] == [0.03, 0.03]


def test_a_clock_that_moves_makes_the_load_invalid(
    known_server: Any, generators: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clocks, "LIMIT_S", 0.001)
    moved = iter([0, 0, 0, 2_000_000])  # two generators before the load, and after it

    def compare(_: object) -> RoundTrip:
        at_ns = next(moved)
        return RoundTrip(0, at_ns, at_ns, 0)

    monkeypatch.setattr(remote, "compare", compare)
    target = Target(known_server.url, json.dumps({}))
    recording = generators(2).run_load(target, specs(4), np.zeros(4), observer=Counting(), time_limit_s=60)
    assert [r.status for r in recording.records(EVER)] == ["ok"] * 4
    name = recording.health.clocks[1].generator
    assert recording.health.fault == (
        f"the clock of generator {name} is known only to within 2.00 ms (it moved by +2.00 ms during the load); "
        "the limit is 1 ms"
    )


def test_a_stream_on_another_clock_is_the_same_stream() -> None:
    stream = Stream(3, b"", 10**18)
    stream.sent_ns, stream.ready_ns = 10**18 + 5, 10**18 - 7
    stream.response = bytearray(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    stream.ends.append(len(stream.response))
    stream.stamps.append(10**18 + 50)
    stream.read_ns.append(10**18 + 60)
    stream.head = read_head(stream.response)
    same, moved = Recorded.of(stream).stream(0), Recorded.of(stream).stream(1000)
    for other, by in ((same, 0), (moved, 1000)):
        assert (other.index, other.response, other.ends) == (3, stream.response, stream.ends)
        assert (other.intended_ns, other.sent_ns, other.ready_ns) == (10**18 - by, 10**18 + 5 - by, 10**18 - 7 - by)
        assert (other.stamps[0], other.read_ns[0], other.freed_ns) == (10**18 + 50 - by, 10**18 + 60 - by, 0)
        assert other.head is not None
        assert other.head.status == 200
    stream.failure = ("malformed stream", "the server did not answer in HTTP")
    assert (Recorded.of(stream).stream(5).failure, Recorded.of(stream).stream(5).begun) == (stream.failure, True)


def test_a_run_that_is_gone_ends_its_load(known_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt of the run closes its connections: the generator stops sending and takes the next run."""

    class Interrupting(Counting):
        def tick(self, now_s: float, sent: int, first_token: int, finished: int, failed: int) -> bool:
            if finished:
                raise KeyboardInterrupt
            return True

    target = Target(known_server.url, json.dumps({}))
    with GeneratorProcess() as process, Generators([("127.0.0.1", process.port)], TOKEN.encode()) as mine:
        mine.connect()
        with pytest.raises(KeyboardInterrupt):
            mine.run_load(target, specs(400), np.arange(400) * 0.1, observer=Interrupting(), time_limit_s=60)
        recording = mine.run_load(target, specs(2), np.zeros(2), observer=Counting(), time_limit_s=60)
        assert recording.sent == 2
        mine.close()
        while not any(
            "on http" in line and "2 of 2 requests sent, 2 completed, 0 failed" in line for line in process.lines
        ):
            time.sleep(0.02)
    assert any("closed the connection" in line or "broke the connection" in line for line in process.lines)


def test_a_loop_here_is_as_before(known_server: Any) -> None:
    recording = run_closed_loop(Target(known_server.url, "{}"), specs(3), 2, observer=Counting(), time_limit_s=60)
    assert recording.health.hosts == ()
