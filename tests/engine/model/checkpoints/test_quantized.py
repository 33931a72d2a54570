"""Quantized checkpoints give the weights that they stand for, in every way of loading."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.model.loading.open_model import open_model
from engine.model.model_info import read_model_info
from engine.model.sharding.shard_model import shard_model
from engine.model.sharding.tp_plan import plan_tensor_parallel
from tests.engine.model.checkpoints.quantized_files import FORMATS, SIZES, compressed, quantize
from tests.engine.model.sharding.thread_groups import make_groups
from tests.engine.worker.driver import Driver, build_model
from tests.engine.worker.parity import Reference, compare, serve


@pytest.mark.parametrize("form", FORMATS)
def test_quantized_linears_are_the_weights_they_stand_for(form: str, tmp_path: Path) -> None:
    whole = quantize(tmp_path, form)
    config = EngineConfig(model=str(tmp_path), dtype="float32")
    model_info = read_model_info(config)
    assert model_info.weight_bytes == 4 * sum(p.numel() for p in whole.parameters())
    meta_model = open_model(config, model_info)
    meta_model.fill()
    wanted = whole.state_dict()
    for name, value in meta_model.model.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("form", "kind"), [("awq", "mixtral"), ("fp8-blocks", "qwen3_moe")])
def test_quantized_experts_are_merged(form: str, kind: str, tmp_path: Path) -> None:
    whole = quantize(tmp_path, form, kind, moe_intermediate_size=64)
    meta_model = open_model(EngineConfig(model=str(tmp_path)), read_model_info(EngineConfig(model=str(tmp_path))))
    meta_model.fill()
    wanted = whole.state_dict()
    for name, value in meta_model.model.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", FORMATS)
def test_ranks_cut_them(form: str, tmp_path: Path) -> None:
    whole = quantize(tmp_path, form)
    config = EngineConfig(model=str(tmp_path), dtype="float32", tensor_parallel_size=2)
    model_info = read_model_info(config)
    tp_plan = plan_tensor_parallel(config, model_info)
    meta_model = open_model(config, model_info)
    shard_model(meta_model, tp_plan, make_groups(2)[1])
    meta_model.fill()
    mine, wanted = meta_model.model.model.layers[1], whole.model.layers[1]
    torch.testing.assert_close(mine.mlp.down_proj.weight, wanted.mlp.down_proj.weight[:, 64:], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(mine.self_attn.q_proj.weight, wanted.self_attn.q_proj.weight[32:], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["awq", "int8", "fp8"])
def test_they_are_served(form: str, tmp_path: Path, make_driver: Callable[..., Driver]) -> None:
    reference = Reference(quantize(tmp_path, form))
    driver = make_driver(tmp_path, block_size=16)
    row = compare("llama", "chunked", serve(driver, "chunked"), reference)
    assert row.passed, row


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemm layout"),
        ({"quant_method": "gptq", "bits": 3}, "have 3 bits; only 4 and 8 are supported"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantized with bitsandbytes"),
        (compressed("pack-quantized", 4, actorder="group"), "grouped by activation order"),
        (compressed("marlin-24", 4), "of format marlin-24 with 4 bits"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "0 schemes"),
    ],
)
def test_what_is_not_read_is_refused_with_the_reason(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    build_model("llama", tmp_path, **SIZES)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(ModelError) as caught:
        read_model_info(EngineConfig(model=str(tmp_path)))
    assert says in str(caught.value)
