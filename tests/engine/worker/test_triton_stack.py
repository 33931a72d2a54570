"""The fused stack of interpreted Triton kernels equals plain transformers and the CPU, whatever the schedule."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from engine.kernels.triton import launch
from engine.model.loading.open_model import open_model
from engine.worker.torch_device import TorchDevice
from engine.worker.triton_stack import make_stack, refusal
from tests.engine.kernels.triton import quick
from tests.engine.worker.device_driver import CoreDriver, configure, make_device_driver, start_executor
from tests.engine.worker.driver import Driver, Request, build_model
from tests.engine.worker.lora_files import LLAMA, write_adapter
from tests.engine.worker.parity import NEW, Reference, compare, merged, prompts, serve
from tests.engine.worker.stand_in_device import StandInDevice
from tests.engine.worker.test_device_runner import SAMPLINGS, mixed_requests

quick.patch()

PADDING = 3  # tokens and rows
# By kind: new tokens, token budget and blocks, which are too few for all requests at once.
SMALL = {"llama": (9, 12, 15), "qwen2": (12, 8, 22)}


@pytest.fixture
def make_driver() -> Iterator[Callable[..., Driver]]:
    executors: list[Any] = []

    def make(folder: Path, **options: Any) -> Driver:
        driver = make_device_driver(TorchDevice("cpu"), folder, use_triton=True, **options)
        executors.append(driver.executor)
        assert driver.executor.kernels == "triton, fused stack"
        return driver

    yield make
    for executor in executors:
        executor.shutdown()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("kind", "cases"),
    [
        ("llama", ("ragged", "chunked", "prefix hit", "preempted")),
        ("qwen3", ("chunked",)),  # norms of queries and keys
        ("mistral", ("chunked",)),  # a window in all layers
        ("qwen2", ("chunked",)),  # biases; layers with a window beside others without
        ("smollm3", ("ragged",)),  # layers without rotary embedding
    ],
)
def test_the_stack_equals_transformers(
    kind: str, cases: tuple[str, ...], tmp_path: Path, make_driver: Callable[..., Driver]
) -> None:
    more = {"no_rope_layer_interval": 2, "no_rope_layers": None} if kind == "smollm3" else {}
    layers = 3 if kind == "mistral" else 2  # windows of three layers reach the token that `compare` changes
    reference = Reference(build_model(kind, tmp_path, num_hidden_layers=layers, **more))
    driver = make_driver(tmp_path)
    for case in cases:
        row = compare(kind, case, serve(driver, case), reference)
        assert row.passed, row


@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # qwen2: layers with a window beside others without
def test_a_core_that_runs_ahead_gets_the_cpus_tokens(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks, prefix hits, preemptions, adapters; results come after the next step has begun."""
    model = build_model(kind, tmp_path / "model", num_hidden_layers=2)
    adapter = write_adapter(tmp_path / "adapter", model, ("k_proj", "down_proj"), seed=2)
    stand_in = StandInDevice(delay_s=0.1)
    monkeypatch.setattr(launch, "place_of", stand_in.place_of)
    requests = [mixed_requests(SAMPLINGS)[i] for i in (2, 4, 5)]  # 19 to 25 tokens, two of them begin alike
    new, budget, blocks = SMALL[kind]
    options = {"kernels": "torch", "max_num_batched_tokens": budget, "max_model_len": 40}
    found = []
    for device in (None, stand_in):
        executor, resolved = start_executor(
            device, tmp_path / "model", use_triton=True, rows=3, num_blocks=blocks, **options
        )
        driver = CoreDriver(executor, resolved)
        try:
            driver.load_adapter("other", adapter)
            first = driver.run(requests, new, ("", "other", ""))
            again = [driver.run(requests[2:], 3) for _ in range(2)]
            found.append([first, again])
            if device is None:
                assert driver.run(requests[1:2], new) != first[1:2], "the adapter changes nothing"
        finally:
            executor.shutdown()
    assert found[0] == found[1]
    assert driver.executor.kernels == "triton, fused stack"
    assert max(len(prompt) for prompt, _ in requests) > 2 * budget, "no chunks"
    assert driver.most_in_flight >= 2
    assert stand_in.most_unready >= 2, "no result came after the next step had begun"
    assert driver.core.scheduler.counters.num_preemptions > 0
    assert driver.core.scheduler.counters.prefix_hits > 0


@pytest.mark.exhaustive
def test_padding_changes_nothing(tmp_path: Path, make_driver: Callable[..., Driver]) -> None:
    """Padded tokens have no place in the KV cache, padded rows no tokens."""
    reference = Reference(build_model("llama", tmp_path, num_hidden_layers=2))
    driver = make_driver(tmp_path)
    backend: Any = driver.executor._runner._backend
    forward = backend.forward

    def more(tensor: torch.Tensor, value: int) -> torch.Tensor:
        return torch.cat([tensor, tensor.new_full((PADDING,), value)])

    def padded(inputs: Any) -> None:
        planned = dict(inputs.planned)
        for name in ("starts", "counts", "num_computed", "slots"):
            planned[name] = more(planned[name], 0)
        planned["cache_index.0"] = more(planned["cache_index.0"], -1)
        forward(replace(inputs, ids=more(inputs.ids, 0), positions=more(inputs.positions, 0), planned=planned))

    backend.forward = padded
    row = compare("llama", "ragged", serve(driver, "ragged"), reference)
    assert row.passed, row


@pytest.mark.exhaustive
def test_adapters_in_a_mixed_batch(tmp_path: Path, make_driver: Callable[..., Driver]) -> None:
    """One adapter changes all linears, the other one of the three that are computed as one."""
    model = build_model("llama", tmp_path / "model", num_hidden_layers=2)
    folders = [
        write_adapter(tmp_path / "all", model, LLAMA, seed=1),
        write_adapter(tmp_path / "some", model, ("k_proj", "down_proj"), seed=2),
    ]
    driver = make_driver(tmp_path / "model")
    references = {"": Reference(model)}
    for folder in folders:
        driver.executor.call("load_adapter", {"key": folder.name, "path": str(folder)}).result()
        references[folder.name] = merged(model, folder, 2.0)
    requests = [Request(prompt, adapter=key) for prompt in prompts(1)[:3] for key in references]
    driver.run(requests, NEW, seed=3)
    for request in requests:
        assert request.output == references[request.adapter].run(request.prompt)[0], request
    assert len({tuple(request.output) for request in requests[:3]}) == 3


def test_the_model_loses_its_weights_and_tied_ones_are_on_the_device_once(tmp_path: Path) -> None:
    build_model("llama", tmp_path, num_hidden_layers=2, tie_word_embeddings=True)
    config, model_info, _ = configure(tmp_path)
    meta_model = open_model(config, model_info)
    stack = make_stack(meta_model.model, model_info.kv_groups, 10, torch.clone, meta_model.fill)
    meta_model.close()
    products: list[Any] = [stack.head, *(layer.qkv.product for layer in stack.layers)]
    assert products[0].weight is stack.embedding
    assert [len(product.weight) for product in products[1:]] == [64, 64]
    linears = [one for one in meta_model.model.modules() if isinstance(one, torch.nn.Linear | torch.nn.Embedding)]
    assert {one.weight.numel() for one in linears} == {0}


@pytest.mark.parametrize(
    ("kind", "more", "reason"),
    [
        ("granite", {}, "do not support models of type 'granite'"),
        ("llama", {"mlp_bias": True}, "its MLP has biases"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("llama", {}, None),
    ],
)
def test_refusals(kind: str, more: dict[str, Any], reason: str | None, tmp_path: Path) -> None:
    build_model(kind, tmp_path, num_hidden_layers=2, **more)
    meta_model = open_model(*configure(tmp_path)[:2])
    found = refusal(meta_model.model)
    assert found is None if reason is None else reason in str(found)
