"""The EngineCore over real ranks: --tp 1, 2 and 4 and pipeline stages say the same, whatever a scheduler does."""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from engine.clock import MonotonicClock
from engine.columns import column, int32s, int64s
from engine.config import EngineConfig
from engine.core.engine import EngineCore
from engine.memory import resolve
from engine.messages import (
    AddRequest,
    FinishReason,
    Outputs,
    Sampling,
    StepMessage,
    decode_from_core,
    decode_step,
    encode,
    make_handle,
)
from engine.model.model_info import ModelInfo, read_model_info
from engine.resolved_config import ResolvedConfig
from engine.stats import Stats
from engine.worker.in_process import InProcessExecutor
from engine.worker.multiprocess import MultiprocessExecutor
from tests.engine.worker.driver import build_model
from tests.engine.worker.lora_files import LLAMA, write_adapter

PATIENCE_S = 90.0
BLOCK, BLOCKS, ROWS, BUDGET, NEW = 16, 18, 6, 24, 40
SHARED = [(7 * i) % 120 + 1 for i in range(48)]
DRAFTING = {"speculative": "ngram", "num_speculative_tokens": 3}
PROMPTS = [
    [3], [5, 6, 7], [i % 90 + 2 for i in range(90)], [*SHARED, 8], [i % 50 + 9 for i in range(30)],
    [*SHARED, 9, 10], [i % 70 + 3 for i in range(61)], [*SHARED, 11, 12, 13], [4] * 20, [*SHARED[:40], 1],
]  # fmt: skip


class Recording:
    """An executor of which is known what it was told, and how many steps it still had then."""

    def __init__(self, inner: Any):
        self._inner = inner
        self.call, self.shutdown = inner.call, inner.shutdown
        self.messages: list[StepMessage] = []
        self.in_flight: list[int] = []
        self._results: list[Future[bytes]] = []

    def submit(self, step: bytes) -> "Future[None]":
        self.messages.append(decode_step(step))
        self.in_flight.append(sum(not result.done() for result in self._results))
        return self._inner.submit(step)

    def sample(self, step: int, masks: bytes = b"") -> "Future[bytes]":
        self._results.append(self._inner.sample(step, masks))
        return self._results[-1]


@dataclass
class Served:
    """What became of a workload."""

    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    reasons: dict[int, FinishReason] = field(default_factory=dict)
    stats: Stats = field(default_factory=Stats)

    def hear(self, _: int, data: bytes) -> None:
        message = decode_from_core(data)
        assert isinstance(message, Outputs)
        handles = int64s(message.handles)
        if message.counts:
            handles = np.repeat(handles, int32s(message.counts))
        for handle, token in zip(handles.tolist(), int32s(message.tokens).tolist(), strict=True):
            self.tokens[handle].append(token)
        self.reasons |= {one.handle: one.reason for one in message.finished}
        self.stats = message.stats or self.stats


def start_ranks(config: EngineConfig, model_info: ModelInfo, resolved: ResolvedConfig) -> Any:
    """The executor of a configuration on this machine."""
    several = config.num_ranks > 1
    return (MultiprocessExecutor if several else InProcessExecutor)(config, model_info, resolved)


def serve_all(
    folder: Path,
    size: int,
    start: Callable[..., Any] = start_ranks,
    adapters: Mapping[str, Path] = MappingProxyType({}),
    **flags: Any,
) -> tuple[list[list[int]], Stats, Recording]:
    """The tokens of all prompts, which come at once, to fewer blocks than those that have rows will need.

    Args:
        folder: of the model.
        size: `--tp`.
        start: makes the executor, with the arguments of `start_ranks`.
        adapters: folders by name; prompts have the base model and each of them in turn.
        flags: others.
    """
    config = EngineConfig(
        model=str(folder), tensor_parallel_size=size, dtype="float32", max_num_seqs=ROWS, block_size=BLOCK,
        **{"max_num_batched_tokens": BUDGET} | flags,
    )  # fmt: skip
    model_info = read_model_info(config)
    config = dataclasses.replace(config, kv_cache_memory_bytes=model_info.kv_bytes_per_token * BLOCK * BLOCKS)
    resolved = resolve(config, model_info).config
    assert resolved.num_blocks == BLOCKS
    executor = Recording(start(config, model_info, resolved))
    served = Served()
    try:
        core = EngineCore(resolved, executor, MonotonicClock(), served.hear)
        for name, adapter in adapters.items():
            core.load_adapter(name, str(adapter)).result(PATIENCE_S)
        deadline = time.monotonic() + PATIENCE_S
        names = ["", *adapters]
        for i, prompt in enumerate(PROMPTS):
            name = names[i % len(names)]
            core.receive(encode(AddRequest(make_handle(0, i), column(prompt), NEW, Sampling(), adapter=name)))
        while core.has_work:
            assert time.monotonic() < deadline, f"{len(served.reasons)} of {len(PROMPTS)} are done"
            if not core.step(time.monotonic()):
                time.sleep(0.0002)
            core.scheduler.check()
    finally:
        executor.shutdown()
    assert set(served.reasons.values()) == {FinishReason.LENGTH}
    return [served.tokens[make_handle(0, i)] for i in range(len(PROMPTS))], served.stats, executor


def chunks_of_prompts(messages: list[StepMessage]) -> int:
    """Steps that computed a part of a prompt after which more of it was to come."""
    owed: dict[int, int] = {}
    found = 0
    for message in messages:
        for added in message.assigned_slots:
            owed[added.slot] = len(int32s(added.tokens)) - added.num_computed_tokens
        for row, count in int32s(message.chunks, 2).tolist() if message.chunks else ():
            owed[row] -= count
            found += count > 0 and owed[row] > 0
    return found


def build_divisible(folder: Path) -> torch.nn.Module:
    """A model of heads and an MLP that four ranks can divide, and the fused stack can take."""
    return build_model("llama", folder, head_dim=16, num_key_value_heads=4, intermediate_size=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_divisible(folder)
    return folder


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    tokens, stats, executor = serve_all(model, 1)
    assert stats.preemptions > 0
    assert max(executor.in_flight) > 0
    assert len({token for output in tokens for token in output}) > 20, "a model that repeats itself proves nothing"
    return tokens


@pytest.mark.parametrize(
    ("size", "flags"),
    [
        (2, {}),
        (4, {}),
        (2, {"engine": "v0", "enable_chunked_prefill": True}),
        (1, {"pipeline_parallel_size": 3}),
        (2, {"pipeline_parallel_size": 2}),
        (1, {"pipeline_parallel_size": 2, "kernels": "torch"}),
        (2, {"pipeline_parallel_size": 2, **DRAFTING}),
    ],
    ids=["tp 2", "tp 4", "tp 2 of V0", "pp 3", "tp 2 and pp 2", "pp 2 without C++", "draft tokens of stages"],
)
def test_ranks_say_what_one_says(size: int, flags: dict[str, Any], model: Path, expected: list[list[int]]) -> None:
    tokens, stats, executor = serve_all(model, size, **flags)
    assert tokens == expected
    assert [len(output) for output in tokens] == [NEW] * len(PROMPTS)
    assert chunks_of_prompts(executor.messages) > 3
    assert stats.preemptions > 0
    if "engine" not in flags:  # V0 had none of these by default
        assert stats.prefix_hits >= 3 * len(SHARED[:40]) // BLOCK * BLOCK
        stages = flags.get("pipeline_parallel_size", 1)
        assert max(executor.in_flight) >= stages, "no step was handed over before the ones before it were done"
    assert (stats.num_accepted_tokens > 0) == ("speculative" in flags)


def test_stages_in_flight_with_adapters(tmp_path: Path) -> None:
    """Prompts with an adapter and without one share steps; what the two have in common is not shared in the cache."""
    model = build_model("llama", tmp_path / "model", head_dim=16)
    adapters = {"one": write_adapter(tmp_path / "one", model, LLAMA, 1)}
    alone, _, _ = serve_all(tmp_path / "model", 1, adapters=adapters)
    tokens, stats, executor = serve_all(tmp_path / "model", 1, adapters=adapters, pipeline_parallel_size=3)
    assert tokens == alone
    assert stats.preemptions > 0
    assert stats.prefix_hits > 0
    assert max(executor.in_flight) >= 3
    assert tokens != serve_all(tmp_path / "model", 1)[0], "the adapter changes nothing"
