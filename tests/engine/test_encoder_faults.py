"""An input that can't be encoded, with real encoders: only the requests that need it fail, however the model is run."""

import base64
import dataclasses
import io
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from PIL import Image

from engine.clock import MonotonicClock
from engine.columns import column, int32s, int64s
from engine.core.engine import EngineCore
from engine.messages import AddRequest, Finished, FinishReason, Outputs, Sampling, decode_from_core, encode
from engine.resolved_config import ResolvedConfig
from tests.engine.worker.device_driver import start_executor
from tests.engine.worker.mm_driver import BLOCK, ROWS, MMRequest, Prompts, start
from tests.engine.worker.mm_models import MM_MODELS
from tests.engine.worker.mm_parity import NEW, MMReference
from tests.engine.worker.rank_threads import RankThreads
from tests.engine.worker.stand_in_device import StandInDevice
from tests.serving import Served, serve

Built = tuple[Path, Prompts, MMReference]
UNREADABLE = "multimodal input 0 could not be encoded: RuntimeError: the features of a multimodal input can't be read"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder, entry = tmp_path_factory.mktemp("llava"), MM_MODELS["llava"]
    reference = MMReference(entry.build(folder), entry)
    return folder, Prompts(folder, entry), reference


class Core:
    """A real core."""

    def __init__(self, executor: Any, resolved: ResolvedConfig):
        self.core = EngineCore(resolved, executor, MonotonicClock(), self._receive)
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.finished: dict[int, Finished] = {}
        self._handles = 0

    def run(self, requests: list[MMRequest]) -> list[int]:
        """Serve requests to their ends; returns their handles."""
        first = self._handles
        for request in requests:
            message = AddRequest(self._handles, column(request.prompt), NEW, Sampling(), mm_inputs=request.inputs)
            self.core.receive(encode(message))
            self._handles += 1
        deadline = time.monotonic() + 60
        while self.core.has_work:
            assert time.monotonic() < deadline, "the requests take too long"
            if not self.core.step(time.monotonic()):
                time.sleep(0.001)
            self.core.scheduler.check()
        return list(range(first, self._handles))

    def _receive(self, _: int, data: bytes) -> None:
        message = decode_from_core(data)
        if isinstance(message, Outputs):
            handles = int64s(message.handles)
            if message.counts:
                handles = np.repeat(handles, int32s(message.counts))
            for handle, token in zip(handles.tolist(), int32s(message.tokens).tolist(), strict=True):
                self.tokens[handle].append(token)
            self.finished |= {one.handle: one for one in message.finished}


def with_truncated_features(request: MMRequest, folder: Path) -> MMRequest:
    """The same request; the file of its first input has lost its end."""
    first, *others = request.inputs
    path = folder / f"{first.hash.hex()}.truncated"
    path.write_bytes(Path(first.features).read_bytes()[:-7])
    return dataclasses.replace(request, inputs=(msgspec.structs.replace(first, features=str(path)), *others), output=[])


def check_fault(executor: Any, resolved: ResolvedConfig, built: Built, folder: Path) -> Core:
    """Two of six requests share an input whose features can't be read; they can be served later."""
    _, prompts, reference = built
    core = Core(executor, resolved)
    requests = prompts.samples()
    failing = {0, 2}
    sent = [with_truncated_features(one, folder) if n in failing else one for n, one in enumerate(requests)]
    for number, handle in enumerate(core.run(sent)):
        if number in failing:
            assert core.finished[handle].reason == FinishReason.NOT_ENCODED
            assert core.finished[handle].error.startswith(UNREADABLE)
            assert not core.tokens[handle]
        else:
            assert core.tokens[handle] == reference.run(requests[number])[0]
    for number, handle in enumerate(core.run(requests)):
        assert core.tokens[handle] == reference.run(requests[number])[0], "something was left of the fault"
    scheduler = core.core.scheduler
    assert not scheduler.encoder_cache.cache.references
    assert scheduler.pool.num_free == resolved.num_blocks - 1
    assert scheduler.slots.num_running == 0
    return core


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_num_batched_tokens": 9, "encoder_cache_tokens": 32},
        {"ablations": frozenset({"full-state", "no-run-ahead"})},
        {"ablations": frozenset({"no-encoder-cache"})},
    ],
    ids=["v1", "chunks", "one loop", "no encoder cache"],
)
def test_one_rank(changes: dict[str, Any], built: Built, tmp_path: Path) -> None:
    driver = start(built[0])
    try:
        check_fault(driver.executor, dataclasses.replace(driver.resolved, **changes), built, tmp_path)
        encoder_cache = driver.executor._runner._slots.encoder_cache
        assert set(encoder_cache._encoded) <= {one.hash for request in built[1].samples() for one in request.inputs}
    finally:
        driver.executor.shutdown()


@pytest.mark.parametrize(
    ("ranks", "stages"), [(2, 1), (1, 2), (2, 2)], ids=["tp 2", "pp 2", "tp 2 and pp 2"]
)  # fmt: skip
def test_ranks_in_processes(ranks: int, stages: int, built: Built, tmp_path: Path) -> None:
    driver = start(built[0], ranks, pipeline_parallel_size=stages)
    try:
        check_fault(driver.executor, driver.resolved, built, tmp_path)
    finally:
        driver.executor.shutdown()


def test_a_device_that_computes_ahead(built: Built, tmp_path: Path) -> None:
    _, prompts, reference = built
    device, requests = StandInDevice(delay_s=0.01), prompts.samples()
    executor, resolved = start_executor(
        device, built[0], rows=ROWS, block_size=BLOCK, num_blocks=500, kernels="torch"
    )  # fmt: skip
    try:
        core = check_fault(executor, resolved, built, tmp_path)
        device.shortages = 1
        wrong, text = core.run([prompts.request(prompts.text(20, 4), 3, prompts.text(21, 3)), requests[3]])
        assert device.shortages == 0
        assert core.finished[wrong].error.startswith("multimodal input 0 could not be encoded: OutOfMemoryError: ")
        assert core.tokens[text] == reference.run(requests[3])[0]
    finally:
        executor.shutdown()


def test_a_fault_on_one_rank_only(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are threads, which must choose the same tokens in each step, that with the fault included."""
    folder, prompts, reference = built
    ranks = RankThreads(
        [StandInDevice(), StandInDevice()], folder, tmp_path / "store", use_triton=False, rows=ROWS, block_size=BLOCK,
        num_blocks=500, kernels="torch",
    )  # fmt: skip

    def encode(_tensors: Any) -> None:
        raise MemoryError("no room for the tower")

    try:
        core, requests = Core(ranks, ranks.resolved), prompts.samples()
        second: Any = ranks.executors[1]._runner
        with monkeypatch.context() as patch:
            patch.setattr(second._slots.encoder_cache._encoder, "encode", encode)
            wrong, text = core.run([requests[0], requests[3]])
        assert core.finished[wrong].error.startswith(
            "multimodal input 0 could not be encoded: MemoryError: no room for the tower"
        )
        assert core.tokens[text] == reference.run(requests[3])[0]
        for number, handle in enumerate(core.run(requests)):
            assert core.tokens[handle] == reference.run(requests[number])[0]
    finally:
        ranks.shutdown()


# ------------------------------------------------------------------------------------------------------------- served

FLAGS = ("--dtype", "float32", "--max-model-len", "256", "--kernels", "torch", "--kv-cache-memory-bytes", "8MiB",
         "--ablate", "no-encoder-cache", "--mm-processors", "1")  # fmt: skip


@pytest.fixture(scope="module")
def served(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("log"), str(built[0]), *FLAGS) as running:
        yield running


def body_of(color: int, before: str, **more: Any) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (28, 28), (color, 9, 255 - color)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    parts = [{"type": "text", "text": before}, {"type": "image_url", "image_url": {"url": url}}]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 4, "temperature": 0, "ignore_eos": True,
            **more}  # fmt: skip


def ask(server: Served, color: int, before: str, **more: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=body_of(color, before, **more), timeout=100)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def files_of(server: Served) -> set[Path]:
    """The feature files of the API process, which the core has links to."""
    descriptors = Path(f"/proc/{server.process.pid}/fd")
    targets = [os.readlink(one) for one in descriptors.iterdir() if one.is_symlink()]
    folders = {Path(target).parent for target in targets if "redline-mm-" in target}
    return {file for folder in folders for file in folder.iterdir() if file.name.isdecimal()}


@pytest.mark.parametrize("stream", [False, True])
def test_features_that_are_damaged_in_shared_memory(served: Served, stream: bool) -> None:
    color, other = (10, 20) if stream else (30, 40)
    before = files_of(served)
    text_of(ask(served, color, "first"))
    [file] = files_of(served) - before
    expected = text_of(ask(served, other, "other"))
    os.truncate(file, file.stat().st_size - 7)
    with ThreadPoolExecutor(5) as pool:
        undisturbed = [pool.submit(ask, served, other, "other") for _ in range(4)]
        failed = pool.submit(ask, served, color, "second", stream=stream).result()
        assert [text_of(one.result()) for one in undisturbed] == [expected] * 4
    if stream:
        [error] = [line for line in failed.text.splitlines() if line.startswith('data: {"error"')]
        found = json.loads(error.removeprefix("data: "))["error"]
    else:
        assert failed.status_code == 500
        found = failed.json()["error"]
    assert found["message"].startswith(UNREADABLE)
    assert not file.exists(), "the damaged file is still in the cache"
    again = text_of(ask(served, color, "second"))
    assert again == text_of(ask(served, color, "second", cache_salt="anew")), "blocks with zeros were found"
    assert served.client.get("/health").status_code == 200
    assert served.metric("redline:mm_mirror_misses_total") == 0
    assert served.metric("vllm:num_requests_running") == 0
