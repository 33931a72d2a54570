"""Checkpoints in few bits give the weights that they stand for, through every way of loading."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.model.facts import read_facts
from engine.model.load import open_model
from engine.model.shard import shard
from engine.model.split import plan_split
from tests.engine.model.few_bits import FORMATS, SIZES, compressed, quantise
from tests.engine.model.groups import make_groups
from tests.engine.worker.driver import Driver, build_model
from tests.engine.worker.parity import Reference, compare, serve


@pytest.mark.parametrize("form", FORMATS)
def test_linears_in_few_bits_are_the_weights_they_stand_for(form: str, tmp_path: Path) -> None:
    whole = quantise(tmp_path, form)
    config = EngineConfig(model=str(tmp_path), dtype="float32")
    facts = read_facts(config)
    assert facts.weight_bytes == 4 * sum(p.numel() for p in whole.parameters())
    blank = open_model(config, facts)
    blank.fill()
    wanted = whole.state_dict()
    for name, value in blank.model.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("form", "kind"), [("awq", "mixtral"), ("fp8-blocks", "qwen3_moe")])
def test_experts_in_few_bits_are_merged(form: str, kind: str, tmp_path: Path) -> None:
    whole = quantise(tmp_path, form, kind, moe_intermediate_size=64)
    blank = open_model(EngineConfig(model=str(tmp_path)), read_facts(EngineConfig(model=str(tmp_path))))
    blank.fill()
    wanted = whole.state_dict()
    for name, value in blank.model.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", FORMATS)
def test_ranks_cut_them(form: str, tmp_path: Path) -> None:
    whole = quantise(tmp_path, form)
    config = EngineConfig(model=str(tmp_path), dtype="float32", tensor_parallel_size=2)
    facts = read_facts(config)
    split = plan_split(config, facts)
    blank = open_model(config, facts)
    shard(blank, split, make_groups(2)[1])
    blank.fill()
    mine, wanted = blank.model.model.layers[1], whole.model.layers[1]
    torch.testing.assert_close(mine.mlp.down_proj.weight, wanted.mlp.down_proj.weight[:, 64:], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(mine.self_attn.q_proj.weight, wanted.self_attn.q_proj.weight[32:], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["awq", "int8", "fp8"])
def test_they_are_served(form: str, tmp_path: Path, make_driver: Callable[..., Driver]) -> None:
    reference = Reference(quantise(tmp_path, form))
    driver = make_driver(tmp_path, block_size=16)
    row = compare("llama", "chunked", serve(driver, "chunked"), reference)
    assert row.passed, row


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemm layout"),
        ({"quant_method": "gptq", "bits": 3}, "have 3 bits; 4 and 8 are read"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised by bitsandbytes"),
        (compressed("pack-quantized", 4, actorder="group"), "grouped by activations"),
        (compressed("marlin-24", 4), "of format marlin-24 with 4 bits"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "0 kinds"),
    ],
)
def test_what_is_not_read_is_refused_with_the_reason(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    build_model("llama", tmp_path, **SIZES)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(ModelError) as caught:
        read_facts(EngineConfig(model=str(tmp_path)))
    assert says in str(caught.value)
