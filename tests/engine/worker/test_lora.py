"""Several adapters and the base in one batch give the tokens that each gives alone."""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.columns import column, int32s
from engine.config import EngineConfig
from engine.errors import ModelError, RedlineError
from engine.memory import resolve
from engine.messages import Sampling, SlotAssignment, StepMessage, decode_result, encode
from engine.model.model_info import read_model_info
from engine.worker.multiprocess import MultiprocessExecutor
from tests.engine.worker.driver import Driver, Request, build_model
from tests.engine.worker.lora_files import LLAMA, write_adapter
from tests.engine.worker.parity import NEW, Reference, merged, prompts


def serve_together(driver: Driver, keys: list[str], references: list[Reference]) -> None:
    """Every prompt under every key, in one random batch after the other."""
    requests = [
        (Request(prompt, adapter=key), one) for prompt in prompts(1) for key, one in zip(keys, references, strict=True)
    ]
    random.Random(1).shuffle(requests)
    driver.run([request for request, _ in requests], NEW, seed=3, preempt=0.4)
    assert driver.shared > 0
    assert driver.preemptions > 0
    for request, reference in requests:
        assert request.output == reference.run(request.prompt)[0], request
    outputs = {tuple(reference.run(prompts(1)[3])[0]) for reference in references}
    assert len(outputs) == len(references)


@pytest.mark.parametrize(
    ("kind", "kernels", "names"),
    [
        ("llama", "torch", LLAMA),
        ("llama", "auto", LLAMA),
        ("qwen3", "auto", ("q_proj", "down_proj")),
        ("gemma2", "torch", ("k_proj", "up_proj")),
        ("phi3", "torch", ("qkv_proj", "o_proj")),
        ("mixtral", "torch", ("v_proj",)),
    ],
)
def test_two_adapters_and_the_base_in_one_batch(
    kind: str, kernels: str, names: tuple[str, ...], tmp_path: Path, make_driver: Callable[..., Driver]
) -> None:
    model = build_model(kind, tmp_path / "model", head_dim=16)
    one = write_adapter(tmp_path / "one", model, names, 1)
    two = write_adapter(tmp_path / "two", model, names[:1], 2, rank=7, use_rslora=True)
    driver = make_driver(tmp_path / "model", block_size=16, kernels=kernels)
    for key, folder in (("one#1", one), ("two#2", two)):
        assert driver.executor.call("load_adapter", {"key": key, "path": str(folder)}).result() > 0
    references = [Reference(model), merged(model, one, 2.0), merged(model, two, 14 / 7**0.5)]
    serve_together(driver, ["", "one#1", "two#2"], references)
    driver.executor.call("unload_adapter", {"key": "one#1"}).result()
    three = write_adapter(tmp_path / "three", model, names, 3)
    driver.executor.call("load_adapter", {"key": "three#3", "path": str(three)}).result()
    serve_together(driver, ["three#3", "", "two#2"], [merged(model, three, 2.0), references[0], references[2]])


def useless(model: torch.nn.Module, names: tuple[str, ...], folder: Path) -> dict[str, str]:
    """Folders of adapters that a model doesn't take, and what is said of them."""
    odd = {
        "wide": ("down_proj", lambda down, up: (torch.nn.functional.pad(down, (0, 1)), up)),
        "tall": (names[0], lambda down, up: (down, torch.nn.functional.pad(up, (0, 0, 0, 2)))),
        "nan": (names[0], lambda down, up: (down * float("nan"), up)),
    }
    said = {"wide": "have shape", "tall": "have shape", "nan": "not finite"}
    found = {str(folder): "isn't an adapter"}
    for name, (linear, change) in odd.items():
        path = write_adapter(folder / name, model, (linear,), 1)
        tensors = load_file(path / "adapter_model.safetensors")
        for key in [key for key in tensors if "lora_A" in key]:
            other = key.replace("lora_A", "lora_B")
            tensors[key], tensors[other] = change(tensors[key], tensors[other])
        save_file(tensors, path / "adapter_model.safetensors")
        found[str(path)] = said[name]
    listed = write_adapter(folder / "listed", model, names, 1)
    (listed / "adapter_config.json").write_text("[]")
    return {**found, str(listed): "holds a list"}


@pytest.mark.parametrize(
    ("kind", "names", "flags"),
    [
        ("llama", LLAMA, {"tensor_parallel_size": 2}),
        ("phi3", ("qkv_proj", "down_proj"), {"tensor_parallel_size": 2}),
        ("llama", LLAMA, {"tensor_parallel_size": 2, "ablate": ("driver-broadcast",)}),
        ("llama", LLAMA, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
    ],
    ids=["llama", "phi3", "rank 0 drives", "tp 2 and pp 2"],
)
def test_ranks_share_adapters(kind: str, names: tuple[str, ...], flags: dict[str, Any], tmp_path: Path) -> None:
    model = build_model(kind, tmp_path / "model")
    folder = write_adapter(tmp_path / "one", model, names, 1)
    config = EngineConfig(model=str(tmp_path / "model"), max_num_seqs=6, block_size=4, dtype="float32", **flags)
    model_info = read_model_info(config)
    config = dataclasses.replace(config, kv_cache_memory_bytes=model_info.kv_bytes_per_token * 4 * 3000)
    executor = MultiprocessExecutor(config, model_info, resolve(config, model_info).config)
    try:
        driver = Driver(executor, rows=6, block_size=4, num_blocks=3000)  # type: ignore[arg-type]
        for at, (path, says) in enumerate(useless(model, names, tmp_path).items()):
            with pytest.raises(ModelError, match=says):
                executor.call("load_adapter", {"key": f"no#{at}", "path": path}).result(60)
        with pytest.raises(ModelError, match="no adapter has the key 'no#1'"):
            executor.call("unload_adapter", {"key": "no#1"}).result(60)
        for method, arguments in (("nonsense", {}), ("load_adapter", {"key": "no#2", "path": 5}), ("load_adapter", {})):
            with pytest.raises(RedlineError):
                executor.call(method, arguments).result(60)
        assert executor.call("load_adapter", {"key": "one#2", "path": str(folder)}).result(60) > 0
        serve_together(driver, ["", "one#2"], [Reference(model), merged(model, folder, 2.0)])
    finally:
        executor.shutdown()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"bias": "all"}, "biases"),
        ({"peft_type": "IA3"}, "of type IA3"),
    ],
)
def test_what_is_not_supported_is_refused(
    change: dict[str, Any], says: str, tmp_path: Path, make_driver: Callable[..., Driver]
) -> None:
    model = build_model("llama", tmp_path / "model")
    folder = write_adapter(tmp_path / "one", model, ("q_proj",), 1, **change)
    driver = make_driver(tmp_path / "model")
    with pytest.raises(ModelError, match=says):
        driver.executor.call("load_adapter", {"key": "one#1", "path": str(folder)}).result()
    request = Request(prompts(1)[2])
    driver.run([request], NEW, seed=1)
    assert request.output == Reference(model).run(request.prompt)[0]


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_an_adapter_of_another_model_is_refused(
    kernels: str, tmp_path: Path, make_driver: Callable[..., Driver]
) -> None:
    other = build_model("llama", tmp_path / "other", hidden_size=64)
    wide = write_adapter(tmp_path / "wide", other, ("q_proj",), 1)
    deep = write_adapter(
        tmp_path / "deep", build_model("llama", tmp_path / "deeper", num_hidden_layers=4, head_dim=16), ("q_proj",), 1
    )
    head = write_adapter(tmp_path / "head", other, ("lm_head",), 1)
    build_model("llama", tmp_path / "model", head_dim=16)
    driver = make_driver(tmp_path / "model", block_size=16, kernels=kernels)
    for folder, says in ((wide, "have shape 64 × 64"), (deep, "layers.3"), (head, "lm_head")):
        with pytest.raises(ModelError, match=says):
            driver.executor.call("load_adapter", {"key": "x#1", "path": str(folder)}).result()


def test_unloading_frees_the_memory(tmp_path: Path, make_driver: Callable[..., Driver]) -> None:
    import gc
    import weakref

    model = build_model("llama", tmp_path / "model", head_dim=16)
    folder = write_adapter(tmp_path / "one", model, LLAMA, 1)
    for kernels in ("torch", "auto"):
        driver = make_driver(tmp_path / "model", block_size=16, kernels=kernels)
        driver.executor.call("load_adapter", {"key": "one#1", "path": str(folder)}).result()
        request = Request(prompts(1)[2], adapter="one#1")
        driver.run([request], NEW, seed=1)
        backend: Any = driver.executor._runner._backend
        if kernels == "torch":
            held = [part.up for parts in backend._adapters._parts.values() for part in parts.values()]
        else:
            held = [array for adapter in backend._adapters.values() for array in adapter.owners]
        watched = [weakref.ref(tensor) for tensor in held]
        assert len(watched) >= 12
        del held
        driver.executor.call("unload_adapter", {"key": "one#1"}).result()
        driver.run([Request(prompts(1)[2])], 2, seed=1)
        gc.collect()
        assert not any(one() for one in watched)


def test_a_row_whose_adapter_is_not_there_is_refused_and_its_neighbor_computed(
    tmp_path: Path, make_driver: Callable[..., Driver]
) -> None:
    model = build_model("llama", tmp_path / "model", head_dim=16)
    expected = Reference(model).run([3, 1, 4])[0][:2]
    for kernels in ("torch", "auto"):
        executor = make_driver(tmp_path / "model", block_size=16, kernels=kernels).executor
        rows = [
            SlotAssignment(row, 1, column([3, 1, 4]), 3, 0, (column([row + 1]),), Sampling(), adapter)
            for row, adapter in enumerate(("", "gone#1"))
        ]
        executor.submit(encode(StepMessage(1, assigned_slots=tuple(rows), chunks=column([[0, 3], [1, 3]]))))
        first = decode_result(executor.sample(1).result())
        assert first.reports is not None
        assert int32s(first.reports.rejected, 2).tolist() == [[1, 1]]
        executor.submit(encode(StepMessage(2, freed_slots=column([1]))))
        second = decode_result(executor.sample(2).result())
        assert second.reports is None
        assert [int(int32s(first.tokens)[0]), *int32s(second.tokens).tolist()] == expected
