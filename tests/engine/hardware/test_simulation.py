"""A server in virtual time: when its tokens arrive, what it counts, how replicas share its requests."""

import numpy as np
import pytest

from engine.config import ResolvedConfig
from engine.core.engine import EngineCore
from engine.core.policy import ChunkedPrefill, FirstComeFirstServed, MixedBatches, PrefillFirst, Watermark
from engine.core.scheduler import Scheduler
from engine.hardware.description import read_hardware
from engine.hardware.executor import SimulatedExecutor, SimulatedHost
from engine.hardware.simulation import Reply, Simulation
from engine.hardware.step_time import DecoderShape, StepTime, StepWork
from engine.hardware.virtual_engine import VirtualClock

H100 = read_hardware("h100")
LLAMA_8B = DecoderShape(32, 4096, 14336, 32, 8, 128, 128256)
STEP_TIME = StepTime(H100, LLAMA_8B)
REQUEST_S = 0.018


def simulation(
    num_blocks: int = 4000,
    budget: int = 2048,
    caching: bool = False,
    ablations: frozenset[str] = frozenset(),
    **options: object,
) -> Simulation:
    config = ResolvedConfig(
        max_model_len=4096, max_num_seqs=32, max_num_batched_tokens=2048, block_size=16, num_blocks=num_blocks,
        enable_prefix_caching=caching,
    )  # fmt: skip
    host = SimulatedHost(H100.host.v1, 1, overlaps=True)

    def make_executor(clock: VirtualClock) -> SimulatedExecutor:
        return SimulatedExecutor(clock, STEP_TIME, host, 32, LLAMA_8B.vocab_size)

    return Simulation(config, make_executor, request_s=REQUEST_S, **options)  # type: ignore[arg-type]


def prompt(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, length, dtype=np.int32)


def finish(server: Simulation) -> list[Reply]:
    ended = []
    while found := server.run_until(server.now() + 1000):
        ended += found
    return ended


def run(server: Simulation, count: int = 24, every_s: float = 0.02) -> list[Reply]:
    """Requests at equal intervals, to the end of the last."""
    handles = []
    for number in range(count):
        while server.now() < number * every_s:
            server.run_until(number * every_s)
        handles.append(server.submit(prompt(number, 200 + 10 * number), 300))
    finish(server)
    return server.take(handles)


def times(replies: list[Reply]) -> list[float]:
    assert all(reply.ended and not reply.error for reply in replies)
    return [time for reply in replies if reply.times for time in (reply.times.first_s, *reply.times.gaps_s.tolist())]


def test_the_cost_of_a_request_delays_its_first_token_and_nothing_else() -> None:
    server = simulation()
    handle = server.submit(prompt(0, 1000), 4)
    (ended,) = finish(server)
    (reply,) = server.take([handle])
    assert (ended.handle, reply.count, reply.prompt_tokens, reply.cached_tokens) == (handle, 4, 1000, 0)
    assert reply.times is not None
    host = SimulatedHost(H100.host.v1, 1, overlaps=True)
    first = host.with_host(STEP_TIME.seconds(StepWork(chunks=[(1000, 0)], sampled=1)), 1)
    assert reply.times.first_s == pytest.approx(REQUEST_S + first)
    assert len(reply.times.gaps_s) == 3
    assert reply.times.last_s == pytest.approx(reply.times.first_s + reply.times.gaps_s.sum())


def test_the_end_of_a_request_ends_the_wait() -> None:
    server = simulation()
    server.submit(prompt(0, 100), 2)
    server.submit(prompt(1, 100), 40)
    (first,) = server.run_until(1000)
    assert first.handle == 0
    assert server.now() < 0.1
    server.submit(prompt(2, 100), 1)
    assert {reply.handle for reply in finish(server)} == {1, 2}
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
    handles = [server.submit(prompt(seed, 1000), 1000) for seed in range(3)]
    server.run_until(0.5)
    late = server.submit(prompt(9, 10), 5)
    (before,) = server.stats()
    assert (before.running, before.waiting) == (1, 2)
    server.abort([*handles, late])
    (after,) = server.stats()
    assert (after.running, after.waiting) == (0, 0)
    assert server.run_until(10.0) == []
    replies = server.take([*handles, late])
    assert replies[0].times is not None
    assert [reply.times for reply in replies[1:]] == [None] * 3


def test_a_prompt_that_is_too_long_is_refused_and_nothing_else() -> None:
    server = simulation()
    long, short = server.submit(prompt(0, 5000), 5), server.submit(prompt(1, 50), 5)
    replies = {reply.handle: reply for reply in finish(server)}
    assert replies[long].refused
    assert "5000 tokens" in replies[long].error
    assert replies[short].count == 5


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
