"""The number of KV blocks is what is left when the weights are loaded and the largest step has run."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from engine.errors import OutOfMemoryError
from engine.kernels.triton import launch
from engine.memory import block_limits, resolve, with_measured
from engine.messages import MemoryLine
from engine.model.loading.open_model import open_model
from engine.worker import device_assembly
from engine.worker.device import DeviceMemory
from engine.worker.device_builder import BuiltDeviceRunner, build_device_runner
from engine.worker.device_memory import BYTES_PER_GRAPH, PROBE_BLOCKS
from tests.engine.kernels.triton import quick
from tests.engine.worker.device_driver import configure
from tests.engine.worker.driver import VOCAB, build_model
from tests.engine.worker.stand_in_device import StandInDevice

quick.patch()

BLOCK = 512  # bytes: a layer, 4 tokens, 2 heads of 8 numbers
WORKSPACE = 50 << 10
OTHERS = 2  # captured steps beside the largest: decode steps of 1 and 2 tokens
GRAPHS = OTHERS * BYTES_PER_GRAPH
LEAST, MOST = 11, 21  # one request of 40 tokens and the null block; two of them


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    build_model("llama", folder, num_hidden_layers=1)
    return folder


def facts(free: int) -> DeviceMemory:
    """A device that always has `free` bytes beside the small cache."""
    return DeviceMemory(1 << 30, free - PROBE_BLOCKS * BLOCK, 100 << 10, (100 << 10) + WORKSPACE)


@pytest.fixture
def build(llama: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., BuiltDeviceRunner]:
    def build(device: StandInDevice, utilization: float = 1.0, chosen: bool = True, **options: Any) -> Any:
        monkeypatch.setattr(launch, "place_of", device.place_of)
        limits: dict[str, Any] = {"rows": 2, "max_model_len": 40, "max_num_batched_tokens": 8, "num_blocks": 15}
        config, model_info, resolved = configure(llama, **limits, **options)
        assert model_info.kv_bytes_per_token * resolved.block_size == BLOCK
        assert block_limits(resolved) == (LEAST, MOST)
        if chosen:
            config = dataclasses.replace(config, kv_cache_memory_bytes=None)
        meta_model = open_model(config, model_info)
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(
                build_device_runner, config, model_info, resolved, meta_model, device,
                use_triton=True, memory_utilization=utilization,
            ).result()  # fmt: skip

    return build


def num_blocks(built: BuiltDeviceRunner) -> int:
    backend: Any = built.runner._backend
    return len(backend._attention._caches[0].keys)


def test_blocks_are_what_is_left(build: Callable[..., BuiltDeviceRunner]) -> None:
    built = build(StandInDevice(captures=True, memory_facts=facts(GRAPHS + WORKSPACE + 17 * BLOCK + 100)))
    assert built.num_blocks == num_blocks(built) == 17
    assert built.memory == (
        MemoryLine("workspace (measured)", WORKSPACE, "--max-num-batched-tokens, --max-num-seqs"),
        MemoryLine("CUDA graphs", GRAPHS, "--enforce-eager"),
    )
    assert built.warnings == ()
    assert built.runner.captures


def test_a_share_of_the_memory_stays_free(build: Callable[..., BuiltDeviceRunner]) -> None:
    free = (1 << 29) + WORKSPACE + 17 * BLOCK
    built = build(StandInDevice(memory_facts=facts(free)), utilization=0.5)
    assert built.num_blocks == 17
    assert [line.what for line in built.memory] == ["workspace (measured)"]


def test_there_are_no_more_blocks_than_requests_can_use(build: Callable[..., BuiltDeviceRunner]) -> None:
    assert build(StandInDevice(memory_facts=facts(1 << 29))).num_blocks == MOST


def test_a_cache_that_the_user_chose_stays(build: Callable[..., BuiltDeviceRunner]) -> None:
    assert build(StandInDevice(memory_facts=facts(1 << 29)), chosen=False).num_blocks == 15


def test_logits_of_draft_tokens_have_room(build: Callable[..., BuiltDeviceRunner]) -> None:
    device = StandInDevice(memory_facts=facts(1 << 29))
    built = build(device, speculative="ngram", num_speculative_tokens=3)
    assert built.memory[0].bytes == WORKSPACE + 2 * 3 * VOCAB * 4


def test_graphs_give_way_to_the_only_request(build: Callable[..., BuiltDeviceRunner]) -> None:
    built = build(StandInDevice(captures=True, memory_facts=facts(GRAPHS // 2 + WORKSPACE)))
    assert built.num_blocks == MOST
    assert not built.runner.captures
    assert "CUDA graphs are off: they need 8.0 MiB" in built.warnings[0]


def test_too_little_memory_is_refused_with_figures(build: Callable[..., BuiltDeviceRunner]) -> None:
    message = (
        "one request of 40 tokens needs 5.5 KiB of KV cache, but 100% of 1.0 GiB less weights and 50.0 KiB of "
        "workspace .measured. leave 5.0 KiB: lower --max-model-len"
    )
    with pytest.raises(OutOfMemoryError, match=message):
        build(StandInDevice(memory_facts=facts(WORKSPACE + 10 * BLOCK)))


def test_a_step_that_does_not_fit_is_refused_with_figures(build: Callable[..., BuiltDeviceRunner]) -> None:
    class Short(StandInDevice):
        def release_memory(self) -> None:
            self.shortages = 1

    device = Short(memory_facts=facts(1 << 20))
    with pytest.raises(OutOfMemoryError, match=r"the largest step does not fit: 1023.0 KiB of 1.0 GiB were free"):
        build(device)


def test_a_step_that_can_not_be_captured_is_told(
    build: Callable[..., BuiltDeviceRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = StandInDevice(captures=True, memory_facts=facts(WORKSPACE + 17 * BLOCK))

    def refuse(run: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(device, "capture", refuse)
    built = build(device)
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert built.warnings == (f"CUDA graphs are off: {reason}",)
    assert built.num_blocks == 17
    assert not built.runner.captures


@pytest.mark.parametrize("failures", [1, 2])
def test_a_cache_that_does_not_fit_is_made_smaller_once(
    failures: int, build: Callable[..., BuiltDeviceRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, original = [], device_assembly.KVCache

    def make(groups: Any, blocks: int, *more: Any) -> Any:
        made.append(blocks)
        if 1 < len(made) <= 1 + failures:
            raise torch.OutOfMemoryError("no memory is left")
        return original(groups, blocks, *more)

    monkeypatch.setattr(device_assembly, "KVCache", make)
    device = StandInDevice(memory_facts=facts(WORKSPACE + 20 * BLOCK))
    if failures == 1:
        assert build(device).num_blocks == 19
    else:
        with pytest.raises(OutOfMemoryError, match=r"a KV cache of 9.5 KiB does not fit, .* are free: lower"):
            build(device)
    assert made == [PROBE_BLOCKS, 20, 19]


def test_the_start_table_has_the_measured_lines(llama: Path) -> None:
    config, model_info, _ = configure(llama, rows=2, max_model_len=40, max_num_batched_tokens=8)
    resolution = resolve(dataclasses.replace(config, kv_cache_memory_bytes=None), model_info, 1 << 30)
    measured = (MemoryLine("workspace (measured)", 5, "--a"), MemoryLine("CUDA graphs", 6, "--b"))
    found = with_measured(resolution, 13, measured)
    assert [line.what for line in found.memory] == ["weights", "workspace (measured)", "CUDA graphs", "KV cache"]
    assert found.memory[-1].bytes == 13 * BLOCK
    assert (found.config.num_blocks, found.sequences) == (13, 1)
    assert with_measured(resolution, None, ()) == resolution
    assert [line.bytes for line in with_measured(resolution, None, measured, 2).memory[1:3]] == [10, 12]
