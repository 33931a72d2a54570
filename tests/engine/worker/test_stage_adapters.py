"""Adapters of pipeline stages: each has its layers of them, and an adapter is loaded by all stages or by none."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import ModelError
from engine.kernels.cpu import build
from engine.model.lora.lora_weights import CONFIG, WEIGHTS, Adapter, LowRank, stage_adapter
from engine.model.stage import Stage
from tests.engine.worker.driver import Driver, Request, build_model
from tests.engine.worker.lora_files import LLAMA, write_adapter
from tests.engine.worker.parity import NEW, Reference, merged, prompts
from tests.engine.worker.test_lora import serve_together


def load(driver: Driver, key: str, folder: Path) -> int:
    size: int = driver.executor.call("load_adapter", {"key": key, "path": str(folder)}).result(30)
    return size


def of_layer(adapter: Path, layer: int, folder: Path) -> Path:
    """A copy of an adapter that changes one layer only."""
    tensors = {name: one for name, one in load_file(adapter / WEIGHTS).items() if f".{layer}." in name}
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text((adapter / CONFIG).read_text())
    return folder


@pytest.mark.parametrize(
    ("kind", "kernels", "stages", "names"),
    [
        ("llama", "auto", 3, LLAMA),
        ("llama", "torch", 2, LLAMA),
        ("gemma2", "torch", 3, ("k_proj", "up_proj")),
        ("phi3", "torch", 2, ("qkv_proj", "o_proj")),
    ],
)
def test_two_adapters_and_the_base_in_one_batch(
    kind: str,
    kernels: str,
    stages: int,
    names: tuple[str, ...],
    tmp_path: Path,
    make_staged: Callable[..., Driver],
) -> None:
    if kernels == "auto" and not build.supported_isas():
        pytest.skip("the C++ kernels need AVX2 or NEON")
    model = build_model(kind, tmp_path / "model", head_dim=16)
    one = write_adapter(tmp_path / "one", model, names, 1)
    two = write_adapter(tmp_path / "two", model, names[:1], 2, rank=7, use_rslora=True)
    driver = make_staged(tmp_path / "model", stages, block_size=16, kernels=kernels)
    for key, folder in (("one#1", one), ("two#2", two)):
        assert load(driver, key, folder) > 0
    references = [Reference(model), merged(model, one, 2.0), merged(model, two, 14 / 7**0.5)]
    serve_together(driver, ["", "one#1", "two#2"], references)
    driver.executor.call("unload_adapter", {"key": "one#1"}).result(30)
    three = write_adapter(tmp_path / "three", model, names, 3)
    load(driver, "three#3", three)
    serve_together(driver, ["three#3", "", "two#2"], [merged(model, three, 2.0), references[0], references[2]])


def test_an_adapter_of_the_layers_of_one_stage(tmp_path: Path, make_staged: Callable[..., Driver]) -> None:
    model = build_model("llama", tmp_path / "model", head_dim=16)
    whole = write_adapter(tmp_path / "whole", model, LLAMA, 1)
    driver = make_staged(tmp_path / "model", 3, block_size=16)
    references, keys = [Reference(model)], [""]
    for layer in range(3):
        folder = of_layer(whole, layer, tmp_path / f"layer{layer}")
        size = load(driver, f"layer#{layer}", folder)
        assert (size > 0) == (layer == 2), "the last stage answers"
        references.append(merged(model, folder, 2.0))
        keys.append(f"layer#{layer}")
    serve_together(driver, keys, references)


def test_what_one_stage_can_not_load_none_has(tmp_path: Path, make_staged: Callable[..., Driver]) -> None:
    """The cause is that of the stage with the layer, under the number that the layer has in the model."""
    model = build_model("llama", tmp_path / "model", head_dim=16)
    good = write_adapter(tmp_path / "good", model, ("q_proj",), 1)
    driver = make_staged(tmp_path / "model", 3, block_size=16)
    for layer in range(3):
        whole = write_adapter(tmp_path / f"whole{layer}", model, ("o_proj",), 1)
        folder = of_layer(whole, layer, tmp_path / f"{layer}")
        tensors = load_file(folder / WEIGHTS)
        wide = next(name for name in tensors if "lora_A" in name)
        tensors[wide] = torch.nn.functional.pad(tensors[wide], (0, 3))
        save_file({**load_file(good / WEIGHTS), **tensors}, folder / WEIGHTS)
        with pytest.raises(ModelError, match=rf"layers\.{layer}\.self_attn\.o_proj have shape"):
            load(driver, f"no#{layer}", folder)
        with pytest.raises(ModelError, match="no adapter has the key"):
            driver.executor.call("unload_adapter", {"key": f"no#{layer}"}).result(30)
    deep = write_adapter(
        tmp_path / "deep", build_model("llama", tmp_path / "deeper", num_hidden_layers=4, head_dim=16), ("q_proj",), 1
    )
    with pytest.raises(ModelError, match=r"layers\.3\..*, but the model has 3 layers"):
        load(driver, "deep#1", deep)
    with pytest.raises(ModelError, match="isn't an adapter"):
        load(driver, "gone#1", tmp_path / "gone")
    load(driver, "good#1", good)
    request = Request(prompts(1)[2], adapter="good#1")
    driver.run([request], NEW, seed=1)
    assert request.output == merged(model, good, 2.0).run(request.prompt)[0]


def test_a_stage_keeps_its_layers_and_what_is_outside_of_layers() -> None:
    part = LowRank(torch.zeros(1, 2), torch.zeros(2, 1))
    paths = [f"model.layers.{number}.mlp.up_proj" for number in range(4)]
    whole = Adapter(dict.fromkeys([*paths, "model.project_in", "model.layers.x.up_proj"], part))
    own = stage_adapter(whole, Stage(1, 3, 1, 3), "model.layers", 4)
    assert list(own.linears) == [*paths[1:3], "model.project_in", "model.layers.x.up_proj"]
    with pytest.raises(ModelError, match=r"model\.layers\.3\.mlp\.up_proj, but the model has 3 layers"):
        stage_adapter(whole, Stage(0, 3, 0, 1), "model.layers", 3)


def test_the_config_is_read_by_each_stage(tmp_path: Path, make_staged: Callable[..., Driver]) -> None:
    model = build_model("llama", tmp_path / "model", head_dim=16)
    folder = write_adapter(tmp_path / "one", model, ("q_proj",), 1)
    said = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**said, "use_dora": True}))
    driver = make_staged(tmp_path / "model", 2, block_size=16)
    with pytest.raises(ModelError, match="the adapter has DoRA"):
        load(driver, "dora#1", folder)
