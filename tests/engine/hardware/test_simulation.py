"""A server in virtual time: when its tokens arrive, what it counts, how replicas share its requests."""

import numpy as np
import pytest

from engine.core.engine import EngineCore
from engine.core.policy import ChunkedPrefill, FirstComeFirstServed, MixedBatches, PrefillFirst, Watermark
from engine.core.scheduler import Scheduler
from engine.hardware.simulation import Reply, Simulation
from engine.hardware.step_time import StepWork
from tests.simulated_server import HOST, REQUEST_S, STEP_TIME, simulation


def prompt(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, length, dtype=np.int32)


def finish(server: Simulation) -> list[Reply]:
    ended = []
    while found := server.run_until(server.now() + 1000):
        ended += found
    return ended


def run(server: Simulation, count: int = 24, every_s: float = 0.02) -> list[Reply]:
    """Requests at equal intervals, to the end of the last."""
    replies = []
    for number in range(count):
        while server.now() < number * every_s:
            server.run_until(number * every_s)
        replies.append(server.submit(prompt(number, 200 + 10 * number), 300))
    finish(server)
    server.take(replies)
    return replies


def times(replies: list[Reply]) -> list[float]:
    assert all(reply.ended and not reply.error for reply in replies)
    return [time for reply in replies if reply.times for time in (reply.times.first_s, *reply.times.gaps_s.tolist())]


def test_the_cost_of_a_request_delays_its_first_token_and_nothing_else() -> None:
    server = simulation()
    reply = server.submit(prompt(0, 1000), 4)
    assert finish(server) == [reply]
    server.take([reply])
    assert (reply.ended, reply.count, reply.prompt_tokens, reply.cached_tokens) == (True, 4, 1000, 0)
    assert reply.times is not None
    first = HOST.with_host(STEP_TIME.seconds(StepWork(chunks=[(1000, 0)], sampled=1)), 1)
    assert reply.times.first_s == pytest.approx(REQUEST_S + first)
    assert len(reply.times.gaps_s) == 3
    assert reply.times.last_s == pytest.approx(reply.times.first_s + reply.times.gaps_s.sum())


def test_the_end_of_a_request_ends_the_wait() -> None:
    server = simulation()
    short, long = server.submit(prompt(0, 100), 2), server.submit(prompt(1, 100), 40)
    assert server.run_until(1000) == [short]
    assert server.now() < 0.1
    third = server.submit(prompt(2, 100), 1)
    assert finish(server) == [third, long]
    assert server.run_until(2000.0) == []
    assert server.now() == 2000.0


def test_runs_are_equal_to_the_digit() -> None:
    first, second = simulation(500), simulation(500)
    assert times(run(first)) == times(run(second))
    assert first.stats() == second.stats()
    assert first.stats()[0].preemptions > 0


def test_counters_are_the_cores() -> None:
    server = simulation(caching=True)
    for _ in range(2):
        server.submit(prompt(7, 320), 5)
        finish(server)
    (stats,) = server.stats()
    assert (stats.prefix_queries, stats.prefix_hits, stats.running, stats.waiting) == (640, 304, 0, 0)
    assert stats.generation_tokens == 10


def test_aborted_requests_free_their_place() -> None:
    server = simulation(num_blocks=100)
    replies = [server.submit(prompt(seed, 1000), 1000) for seed in range(3)]
    server.run_until(0.5)
    late = server.submit(prompt(9, 10), 5)
    (before,) = server.stats()
    assert (before.running, before.waiting) == (1, 2)
    server.abort([*replies, late])
    (after,) = server.stats()
    assert (after.running, after.waiting) == (0, 0)
    assert server.run_until(10.0) == []
    server.take([*replies, late])
    assert replies[0].times is not None
    assert replies[0].count == len(replies[0].times.gaps_s) + 1
    assert [reply.times for reply in (*replies[1:], late)] == [None] * 3
    assert not any(reply.ended for reply in (*replies, late))


def test_a_prompt_that_is_too_long_is_refused_and_nothing_else() -> None:
    server = simulation()
    long, short = server.submit(prompt(0, 5000), 5), server.submit(prompt(1, 50), 5)
    finish(server)
    assert long.refused
    assert "5000 tokens" in long.error
    assert (short.count, short.error) == (5, "")


def test_replicas_share_the_load() -> None:
    one, two = simulation(), simulation(replicas=2)
    alone, shared = run(one, every_s=0.001), run(two, every_s=0.001)
    assert max(r.times.last_s for r in shared if r.times) < max(r.times.last_s for r in alone if r.times)
    assert [stats.prompt_tokens for stats in two.stats()] == pytest.approx([len(alone) * 315 / 2] * 2, rel=0.1)


def test_a_prefix_goes_to_the_replica_that_has_it() -> None:
    server = simulation(replicas=2, caching=True)
    for _ in range(3):
        for seed in (1, 2):
            server.submit(prompt(seed, 1600), 5)
            finish(server)
    assert [stats.prefix_hits for stats in server.stats()] == [2 * 1584, 2 * 1584]


def test_the_core_is_the_engines_own() -> None:
    core = simulation().replicas[0].engine.core
    assert type(core) is EngineCore
    assert type(core.scheduler) is Scheduler


MUTATIONS: dict[str, tuple[type, str, object]] = {
    "the oldest request is preempted": (
        FirstComeFirstServed,
        "choose_victim",
        lambda _, slots: next(iter(slots.admission_order)),
    ),
    "small chunks": (ChunkedPrefill, "chunk_size", lambda _self, _owed, possible, /: min(possible, 64)),
    "blocks stay free": (Watermark, "num_reserved_blocks", lambda _self, running: 50 if running else 0),
    "no request decodes beside a prompt": (MixedBatches, "schedule_batch", PrefillFirst.schedule_batch),
    "a smaller budget": (Scheduler, "max_num_batched_tokens", property(lambda _: 100, lambda *_: None)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_change_of_the_scheduler_shows_in_the_times(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = times(run(simulation(500)))
    owner, name, changed = MUTATIONS[mutation]
    monkeypatch.setattr(owner, name, changed, raising=False)
    assert times(run(simulation(500))) != plain
