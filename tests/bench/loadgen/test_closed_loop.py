"""Closed loops, connections that are used again, and loads shared by several processes."""

import json
import socket
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from bench.loadgen import processes_for, run_closed_loop, run_load
from bench.loadgen.load import CHUNKS_PER_CORE
from bench.target import Target
from bench.workloads import RequestSpec

EVER = (-1.0, float("inf"))


class Quiet:
    def tick(self, now_s: float, sent: int, first_token: int, finished: int, failed: int) -> bool:
        return True


class Counting(Quiet):
    def __init__(self, stop_after: int | None = None):
        self.stop_after = stop_after
        self.last: tuple[int, int, int, int] = (0, 0, 0, 0)

    def tick(self, now_s: float, sent: int, first_token: int, finished: int, failed: int) -> bool:
        self.last = (sent, first_token, finished, failed)
        return self.stop_after is None or finished < self.stop_after


class KeepingServer:
    """Answers on connections that it keeps; `answers_each` requests a connection, then it closes without a word."""

    def __init__(self, answers_each: int = 1_000_000):
        self.answers_each = answers_each
        self.connections = 0
        self.requests = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        event = b'data: {"choices": [{"index": 0, "text": "a", "finish_reason": "length"}]}\n\ndata: [DONE]\n\n'
        answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(event), event)
        with sock:
            for _ in range(self.answers_each):
                data = b""
                while b'"prompt"' not in data or not data.endswith(b"}"):
                    piece = sock.recv(65536)
                    if not piece:
                        return
                    data += piece
                self.requests += 1
                sock.sendall(answer)
            sock.recv(65536)  # takes one more and never answers it


@pytest.fixture
def keeping() -> Iterator[KeepingServer]:
    server = KeepingServer()
    yield server
    server.close()


def specs(count: int, tokens: int = 1) -> list[RequestSpec]:
    return [RequestSpec(2, tokens, prompt_ids=[1, 2]) for _ in range(count)]


def test_a_closed_loop_keeps_so_many_open_and_no_more(known_server: Any) -> None:
    tokens = list(range(3, 23))
    target = Target(known_server.url, json.dumps({"ttft": 0.02, "itl": 0.01}))
    requests = [RequestSpec(1, count, prompt_ids=[1]) for count in tokens]
    recording = run_closed_loop(target, requests, 4, observer=Quiet(), time_limit_s=60)
    rows = recording.records(EVER)
    assert [(r.status, r.output_tokens) for r in rows] == [("ok", count) for count in tokens]
    assert not recording.cut_short
    log = known_server.sent(len(tokens))
    events = sorted(
        [(entry["received_ns"], 1) for entry in log.values()] + [(entry["chunks_ns"][-1], -1) for entry in log.values()]
    )
    open_ones = np.cumsum([step for _, step in events])
    assert open_ones.max() <= 4
    # A turn follows an end: the fifth request begins when the shortest of the first four is over.
    ends = sorted(r.intended_s + (r.e2e_s or 0.0) for r in rows)
    starts = sorted(r.intended_s for r in rows)
    assert all(start >= end for start, end in zip(starts[4:], ends, strict=False))
    assert all(r.sent_s >= r.intended_s for r in rows)


def test_more_streams_than_requests(known_server: Any) -> None:
    recording = run_closed_loop(Target(known_server.url, "{}"), specs(3), 50, observer=Quiet(), time_limit_s=60)
    assert [r.status for r in recording.records(EVER)] == ["ok"] * 3


def test_a_closed_loop_without_a_server_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    target = Target(f"http://127.0.0.1:{port}", "m")
    recording = run_closed_loop(target, specs(2000), 8, observer=Quiet(), time_limit_s=30)
    assert {r.status for r in recording.records(EVER)} == {"connection"}
    assert len(recording.records(EVER)) == 2000


def test_connections_are_used_again(keeping: KeepingServer) -> None:
    recording = run_closed_loop(Target(keeping.url, "m"), specs(60), 3, observer=Quiet(), time_limit_s=30)
    assert [r.status for r in recording.records(EVER)] == ["ok"] * 60
    assert (keeping.connections, keeping.requests) == (3, 60)


def test_an_open_loop_uses_them_again_too(keeping: KeepingServer) -> None:
    times = np.arange(5) * 0.4  # each is over long before the next opens its own
    recording = run_load(Target(keeping.url, "m"), specs(5), times, observer=Quiet(), time_limit_s=30)
    assert [r.status for r in recording.records(EVER)] == ["ok"] * 5
    assert keeping.connections == 1


def test_a_used_connection_that_the_server_gave_up_is_replaced() -> None:
    """The server takes the second request of each connection and closes it: the request goes out again on a new one."""
    server = KeepingServer(answers_each=1)
    recording = run_closed_loop(Target(server.url, "m"), specs(6), 1, observer=Quiet(), time_limit_s=30)
    server.close()
    assert [r.status for r in recording.records(EVER)] == ["ok"] * 6
    assert recording.sent == 6
    assert server.connections == 6


@pytest.mark.parametrize("closed", [False, True])
def test_several_processes_make_one_record(known_server: Any, closed: bool) -> None:
    tokens = list(range(4, 25))
    target = Target(known_server.url, json.dumps({"ttft": 0.05, "itl": 0.01}))
    requests = [RequestSpec(1, count, prompt_ids=[1]) for count in tokens]
    watch = Counting()
    if closed:
        recording = run_closed_loop(target, requests, 5, observer=watch, time_limit_s=60, processes=2)
    else:
        times = np.arange(len(tokens)) * 0.02
        recording = run_load(target, requests, times, observer=watch, time_limit_s=60, processes=2)
    rows = recording.records(EVER)
    assert [(r.index, r.status, r.output_tokens) for r in rows] == [(i, "ok", n) for i, n in enumerate(tokens)]
    log = known_server.sent(len(tokens))
    for row, count in zip(rows, tokens, strict=True):
        true_ttft = (log[count]["chunks_ns"][0] - log[count]["received_ns"]) / 1e9
        assert row.ttft_s is not None
        assert true_ttft <= row.ttft_s < true_ttft + 0.25
    if not closed:
        assert [r.intended_s for r in rows] == pytest.approx(times.tolist(), abs=1e-6)
    health = recording.health
    assert health.processes == 2
    assert health.cpu_s > 0
    assert health.chunks == sum(tokens)
    assert watch.last == (21, 21, 21, 0)
    assert (recording.sent, recording.cut_short) == (21, False)


def test_several_processes_are_cut_short_together(known_server: Any) -> None:
    target = Target(known_server.url, json.dumps({"itl": 0.05}))
    watch = Counting(stop_after=2)
    times = np.arange(12) * 0.5
    recording = run_load(target, specs(12, 5), times, observer=watch, time_limit_s=60, processes=2)
    assert recording.cut_short
    assert 2 <= sum(r.status == "ok" for r in recording.records(EVER)) < 12


def test_several_processes_keep_up_the_load_until_all_awaited_ended(known_server: Any) -> None:
    target = Target(known_server.url, json.dumps({"itl": 0.1}))
    requests = [*specs(1, 12), *specs(1, 2), *specs(100, 2)]  # the first takes long, the second is soon over
    recording = run_load(
        target, requests, np.arange(102) * 0.05, observer=Quiet(), time_limit_s=60, needed=2, processes=2
    )
    rows = recording.records(EVER)
    assert recording.cut_short
    assert rows[0].status == "ok"
    # The process whose own request ended at once went on sending: both kinds of index are there until about 1.2 s.
    late = {r.index % 2 for r in rows if r.intended_s > 0.6}
    assert late == {0, 1}
    assert len(rows) < 60
    assert all(a.intended_s <= b.intended_s for a, b in pairwise(rows))


def test_processes_follow_the_expected_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.loadgen.load.cores", lambda: 4)
    rates = (0, CHUNKS_PER_CORE, CHUNKS_PER_CORE + 1, 3 * CHUNKS_PER_CORE, 100 * CHUNKS_PER_CORE)
    assert [processes_for(rate) for rate in rates] == [1, 1, 2, 3, 4]
