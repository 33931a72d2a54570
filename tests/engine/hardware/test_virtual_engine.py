"""The real core on simulated hardware: times are the model's, to the digit, and the same in each run."""

from collections import defaultdict

import numpy as np
import pytest

from engine.columns import int32s, int64s
from engine.hardware.description import read_hardware
from engine.hardware.executor import SimulatedExecutor, SimulatedHost
from engine.hardware.step_time import DecoderShape, StepTime, StepWork
from engine.hardware.virtual_engine import VirtualClock, VirtualEngine
from engine.messages import AddRequest, FinishReason, Outputs, Sampling, decode_from_core, encode
from engine.resolved_config import ResolvedConfig
from tests.simulated_server import run_engine

H100 = read_hardware("h100")
LLAMA_8B = DecoderShape(32, 4096, 14336, 32, 8, 128, 128256)
STEP_TIME = StepTime(H100, LLAMA_8B)


class Served:
    """One engine and what it sent: times of tokens by request."""

    def __init__(self, num_blocks: int = 4000, *, ablations: frozenset[str] = frozenset(), budget: int = 2048):
        self.clock = VirtualClock()
        host = SimulatedHost(H100.host.v1, 1, overlaps="no-run-ahead" not in ablations)
        executor = SimulatedExecutor(self.clock, STEP_TIME, host, 32, LLAMA_8B.vocab_size)
        config = ResolvedConfig(
            max_model_len=4096, max_num_seqs=32, max_num_batched_tokens=budget, block_size=16, num_blocks=num_blocks,
            enable_prefix_caching=False, ablations=ablations,
        )  # fmt: skip
        self.engine = VirtualEngine(config, executor, self.clock, self._receive)
        self.times: dict[int, list[float]] = defaultdict(list)
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.reasons: dict[int, FinishReason] = {}

    def add(self, handle: int, prompt: int, output: int) -> None:
        tokens = np.random.default_rng(handle).integers(0, 1000, prompt, dtype=np.int32)
        self.engine.core.receive(encode(AddRequest(handle, tokens.tobytes(), output, Sampling())))

    def finish(self) -> None:
        run_engine(self.engine, self.clock, self.clock.now())
        while (event := self.engine.next_event) is not None:
            run_engine(self.engine, self.clock, event)

    def _receive(self, _: int, data: bytes) -> None:
        message = decode_from_core(data)
        if not isinstance(message, Outputs):
            return
        handles = int64s(message.handles)
        if message.counts:
            handles = np.repeat(handles, int32s(message.counts))
        for handle, token in zip(handles.tolist(), int32s(message.tokens).tolist(), strict=True):
            self.times[handle].append(message.at)
            self.tokens[handle].append(token)
        for one in message.finished:
            self.reasons[one.handle] = one.reason


def test_a_request_alone_takes_the_time_of_its_steps() -> None:
    served = Served()
    served.add(0, 1000, 4)
    served.finish()
    works = [StepWork(chunks=[(1000, 0)], sampled=1)]
    works += [StepWork(decodes=1, context=context, sampled=1) for context in (1001, 1002, 1003)]
    host = SimulatedHost(H100.host.v1, 1, overlaps=True)
    seconds = [host.with_host(STEP_TIME.seconds(work), 1) for work in works]
    assert served.times[0] == pytest.approx(np.cumsum(seconds).tolist())
    assert served.reasons == {0: FinishReason.LENGTH}


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    served = Served(budget=512)
    served.add(0, 100, 40)
    run_engine(served.engine, served.clock, 0.05)
    served.add(1, 2000, 1)
    served.finish()
    gaps = np.diff(served.times[0])
    assert np.sum(gaps > 1.2 * np.median(gaps)) == 4  # 2000 tokens, 511 beside a decode
    assert len(served.times[1]) == 1


def run(num_blocks: int, ablations: frozenset[str] = frozenset()) -> Served:
    served = Served(num_blocks, ablations=ablations)
    for handle in range(24):
        served.add(handle, 200 + 10 * handle, 300)
        run_engine(served.engine, served.clock, 0.02 * (handle + 1))
    served.finish()
    return served


def test_runs_are_equal_to_the_digit() -> None:
    first, second = run(500), run(500)
    assert first.times == second.times
    assert first.tokens == second.tokens
    assert {len(tokens) for tokens in first.tokens.values()} == {300}
    assert first.engine.core.scheduler.counters.num_preemptions > 0
    assert all(0 <= token < LLAMA_8B.vocab_size for token in first.tokens[0])


def test_what_the_scheduler_does_shows_in_the_times() -> None:
    plenty, scarce, waiting = run(4000), run(500), run(4000, frozenset({"no-run-ahead"}))
    assert plenty.clock.now() < scarce.clock.now()
    assert plenty.clock.now() < waiting.clock.now()
