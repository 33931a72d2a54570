"""V0's broadcast between ranks: messages arrive unchanged, and followers compute the same tokens."""

import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.columns import column, int32s
from engine.errors import ModelError
from engine.kernels.cpu import build
from engine.messages import Sampling, SlotAssignment, StepMessage, decode_result, encode
from engine.worker import gloo_group
from engine.worker.driver_broadcast import BroadcastMessage, BroadcastStep, broadcast, receive
from engine.worker.gloo_group import GlooGroup
from engine.worker.rank_protocol import Call, PeerLostError
from engine.worker.runner import SamplingPlan
from engine.worker.slots import WorkerSlots
from tests.engine.worker.driver import Driver, Request, build_model
from tests.engine.worker.lora_files import LLAMA, write_adapter
from tests.engine.worker.test_multiprocess import DRIVEN, start

PATIENCE_S = 60.0


Pair = tuple[list[GlooGroup], ThreadPoolExecutor]


@contextmanager
def two_ranks(folder: Path) -> Iterator[Pair]:
    """Groups of this process, and threads to wait in."""
    with ThreadPoolExecutor(2) as threads:
        groups = list(threads.map(lambda rank: GlooGroup(rank, 2, str(folder / "store")), range(2)))
        yield groups, threads
        for one in groups:
            one.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with two_ranks(tmp_path_factory.mktemp("meeting")) as both:
        yield both


def passed_on(pair: Pair, message: BroadcastMessage) -> BroadcastMessage:
    (first, second), threads = pair
    received = threads.submit(receive, second)
    broadcast(first, message)
    return received.result(PATIENCE_S)


def assert_same(found: Any, expected: Any) -> None:
    if dataclasses.is_dataclass(expected):
        for field in dataclasses.fields(expected):
            assert_same(getattr(found, field.name), getattr(expected, field.name))
    elif isinstance(expected, tuple):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tolist() == expected.tolist()
    else:
        assert found == expected


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["", "x"])), min_size=1, max_size=6),
       st.floats(0, 2), st.booleans())  # fmt: skip
def test_a_step_arrives_as_it_was_sent(pair: Any, added: list[tuple[int, int, str]], heat: float, some: bool) -> None:
    slots = WorkerSlots(len(added), 64, 4)
    slots.adapter_slots["x"] = 3
    new = tuple(
        SlotAssignment(i, 1, column(range(known)), known, 0, (column(range(1, 12)),), Sampling(), adapter=name)
        for i, (known, _, name) in enumerate(added)
    )
    chunks = [(i, min(known, count)) for i, (known, count, _) in enumerate(added)]
    batch = slots.begin_step(StepMessage(7, assigned_slots=new, chunks=column(chunks)))
    samples = len(batch.sampled_at)
    temperatures, numbers = np.full(samples, heat, np.float32), np.linspace(0, 0.9, samples)
    at = np.arange(samples, dtype=np.int64)[::2]
    step = BroadcastStep.of(
        batch, SamplingPlan(temperatures if some else None, numbers if some else None, at, at, at, at)
    )
    received = passed_on(pair, step)
    assert_same(received, step)
    assert isinstance(received, BroadcastStep)
    assert received.chosen == some
    assert (received.drawn is not None) == (some and samples > 0 and np.float32(heat) > 0)
    assert not len(received.batch.slots), "rows are rank 0's own"
    assert_same(received.batch.ids, batch.ids)


@pytest.mark.parametrize("what", [Call("load_adapter", {"key": "a#1", "path": "/some/where"}), None])
def test_calls_and_the_end_arrive(pair: Any, what: BroadcastMessage) -> None:
    assert passed_on(pair, what) == what


def test_followers_wait_as_long_as_nobody_asks_for_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gloo_group.GlooGroup, "timeout", timedelta(seconds=0.5))  # of whatever isn't given another
    with two_ranks(tmp_path) as ((first, second), threads):
        received = threads.submit(receive, second)
        time.sleep(1.5)
        assert not received.done()
        broadcast(first, Call("late", {}))
        assert received.result(PATIENCE_S) == Call("late", {})
        with pytest.raises(PeerLostError, match="Timed out"):
            second.all_gather(torch.zeros(1))


def asked(key: str) -> list[Request]:
    """All ways to choose a token: the likeliest, drawn by the ranks, from filtered logits, with logprobs."""
    ways = [
        Sampling(),
        Sampling(temperature=0.8, seed=5),
        Sampling(temperature=0.9, top_k=9, seed=6),
        Sampling(logprobs=2),
    ]
    prompts = [[5, 6, 7, 8, 5, 6, 7, 8, 5, 6], [1, 2] * 9, [9] * 4, [3] * 40]
    return [Request(prompt, way, name) for way, prompt in zip(ways, prompts, strict=True) for name in ("", key)]


def in_a_burst(driver: Driver, prompt: list[int]) -> list[int]:
    """Eight tokens: messages of one step and of several, all handed over before any result is looked at."""
    executor, step = driver.executor, driver.step
    row = SlotAssignment(0, 99, column(prompt), len(prompt), 0, (column([900, 901]),), Sampling())
    messages = [
        StepMessage(step, assigned_slots=(row,), chunks=column([[0, len(prompt)]])),
        StepMessage(step + 1, num_steps=4),
    ]
    messages += [StepMessage(step + 5), StepMessage(step + 6, num_steps=2)]
    results = []
    for message in messages:
        executor.submit(encode(message))
        results += [executor.sample(number) for number in range(message.step, message.step + message.num_steps)]
    return [int32s(decode_result(result.result(PATIENCE_S)).tokens).tolist()[0] for result in results]


@pytest.mark.skipif(not build.supported_isas(), reason="the CPU kernels need AVX2 or NEON")
@pytest.mark.parametrize("guesses", [{}, {"speculative": "ngram", "num_speculative_tokens": 3}])
def test_followers_on_the_fused_stack_make_the_same_tokens(guesses: dict[str, Any], tmp_path: Path) -> None:
    model = build_model("llama", tmp_path / "model", head_dim=16, intermediate_size=64)
    folder = write_adapter(tmp_path / "one", model, LLAMA, 1)
    outputs, logprobs, bursts = [], [], []
    for size, more in ((1, {}), (2, {"ablate": DRIVEN, **guesses})):
        driver = start(tmp_path / "model", size, block_size=16, **more)
        try:
            assert driver.executor.kernels.endswith("fused stack")
            with pytest.raises(ModelError, match="isn't an adapter"):
                driver.executor.call("load_adapter", {"key": "no#0", "path": str(tmp_path)}).result(PATIENCE_S)
            driver.executor.call("load_adapter", {"key": "one#1", "path": str(folder)}).result(PATIENCE_S)
            requests = asked("one#1")
            driver.run(requests, 30, seed=size, preempt=0.3)
            assert driver.preemptions > 0
            outputs.append([request.output[:30] for request in requests])
            logprobs.append([list(one.values())[1:] for request in requests for one in request.logprobs[:30]])
            assert (driver.drafted > 0) == bool(more.get("speculative"))
            if not guesses:
                bursts.append(in_a_burst(driver, [5, 6, 7]))
        finally:
            driver.executor.shutdown()
    assert outputs[0] == outputs[1]
    assert len({tuple(output) for output in outputs[0]}) == 8
    assert not bursts or (bursts[0] == bursts[1] and len(bursts[0]) == 8)
    assert len(logprobs[0]) == 2 * 30
    np.testing.assert_allclose(logprobs[1], logprobs[0], atol=1e-3)
