"""Requests with images through the real core and the real worker, with each part of V0 that concerns them."""

import dataclasses
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from engine.clock import MonotonicClock
from engine.columns import column, int32s, int64s
from engine.core.engine import EngineCore
from engine.messages import AddRequest, Outputs, Sampling, decode_from_core, encode
from tests.engine.worker.mm_driver import MMDriver, MMRequest, Prompts, start
from tests.engine.worker.mm_models import MM_MODELS
from tests.engine.worker.mm_parity import NEW, MMReference

Built = tuple[Path, Prompts, MMReference]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder, entry = tmp_path_factory.mktemp("llava"), MM_MODELS["llava"]
    reference = MMReference(entry.build(folder), entry)
    return folder, Prompts(folder, entry), reference


def serve(driver: MMDriver, requests: list[MMRequest], **changes: object) -> EngineCore:
    """Run requests to their ends; `changes` of the core's configuration."""
    errors: list[str] = []
    tokens: dict[int, list[int]] = defaultdict(list)

    def book(front_end: int, data: bytes) -> None:
        message = decode_from_core(data)
        assert front_end == 0
        if isinstance(message, Outputs):
            handles = int64s(message.handles)
            if message.counts:
                handles = np.repeat(handles, int32s(message.counts))
            for handle, token in zip(handles.tolist(), int32s(message.tokens).tolist(), strict=True):
                tokens[handle].append(token)
            errors.extend(one.error for one in message.finished if one.error)

    config = dataclasses.replace(driver.resolved, **changes)  # type: ignore[arg-type]
    clock = MonotonicClock()
    core = EngineCore(config, driver.executor, clock, book)
    for handle, request in enumerate(requests):
        message = AddRequest(handle, column(request.prompt), NEW, Sampling(), mm_inputs=request.inputs)
        core.receive(encode(message))
    deadline = time.monotonic() + 60
    while core.has_work:
        assert time.monotonic() < deadline, "the requests take too long"
        if not core.step(clock.now()):
            time.sleep(0.001)
        core.scheduler.check()
    assert not errors
    for handle, request in enumerate(requests):
        request.output = tokens[handle]
    return core


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_num_batched_tokens": 9, "encoder_cache_tokens": 32},  # inputs are split, and embeddings evicted
        {"num_blocks": 28},  # requests are preempted
        {"ablations": frozenset({"full-state"}), "max_num_batched_tokens": 9, "encoder_cache_tokens": 32},
        {"ablations": frozenset({"no-encoder-cache"})},
        {"ablations": frozenset({"no-chunking", "prefill-first"})},
    ],
    ids=["v1", "chunks", "few blocks", "full state", "no encoder cache", "no chunking"],
)
def test_the_tokens_are_those_of_transformers(changes: dict[str, object], built: Built) -> None:
    folder, prompts, reference = built
    driver = start(folder)
    try:
        requests = prompts.samples()
        core = serve(driver, requests, **changes)
        for request in requests:
            assert request.output == reference.run(request)[0]
        encoded = driver.executor._runner._slots.encoder_cache.num_encoded
        distinct = len({one.hash for request in requests for one in request.inputs})
        if not changes:
            assert encoded == distinct, "an input was encoded twice"
        if "num_blocks" in changes:
            assert core.scheduler.counters.num_preemptions > 0
        if "no-encoder-cache" in changes.get("ablations", ()):  # type: ignore[operator]
            assert encoded >= sum(len(request.inputs) for request in requests) > distinct
    finally:
        driver.executor.shutdown()
