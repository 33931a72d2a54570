"""Checkpoints in few bits give the weights that they stand for, through every way of loading."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.model.facts import read_facts
from engine.model.load import open_model
from engine.model.shard import shard
from engine.model.split import plan_split
from tests.engine.model.groups import make_groups
from tests.engine.worker.driver import Driver, build_model
from tests.engine.worker.parity import Reference, compare, serve

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
GROUP = 32
Made = tuple[dict[str, Tensor], Tensor]  # what is stored, and what it stands for
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which output each slot of a word has


def put(words: Tensor, slot: int, bits: int, values: Tensor) -> None:
    """Write numbers into a slot of words of 32 bits."""
    words |= (values.long() << (slot * bits)).to(torch.int64)


def words_of(columns: Tensor, bits: int, order: tuple[int, ...] = ()) -> Tensor:
    """Numbers [n, m] as words [n, m * bits / 32], one after the other, the first in the lowest bits."""
    many = 32 // bits
    words = torch.zeros(columns.shape[0], columns.shape[1] // many, dtype=torch.int64)
    for slot, which in enumerate(order or range(many)):
        put(words, slot, bits, columns[:, which::many])
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def random_groups(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers [outputs, inputs], zero points and scales [outputs, groups] that are near a weight."""
    grouped = weight.unflatten(1, (-1, GROUP))
    low, high = grouped.amin(2), grouped.amax(2)
    scales = ((high - low) / ((1 << bits) - 1)).half().float()
    zeros = (-low / scales).round().clamp(1, (1 << bits) - 1)
    whole = (grouped / scales[..., None] + zeros[..., None]).round().clamp(0, (1 << bits) - 1)
    return whole.flatten(1).long(), zeros.long(), scales


def meant(whole: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    return ((whole.unflatten(1, (zeros.shape[1], -1)) - zeros[..., None]) * scales[..., None]).flatten(1)


def awq(weight: Tensor) -> Made:
    whole, zeros, scales = random_groups(weight, 4)
    stored = {
        "qweight": words_of(whole.T, 4, AWQ_ORDER),
        "qzeros": words_of(zeros.T, 4, AWQ_ORDER),
        "scales": scales.T.half().contiguous(),
    }
    return stored, meant(whole, zeros, scales)


def gptq(bits: int, less: int, by_activations: bool = False) -> Callable[[Tensor], Made]:
    def make(weight: Tensor) -> Made:
        inputs = weight.shape[1]
        order = torch.randperm(inputs) if by_activations else torch.arange(inputs)
        whole, zeros, scales = random_groups(weight[:, order], bits)
        back = order.argsort()
        stored = {
            "qweight": words_of(whole[:, back], bits).T.contiguous(),
            "qzeros": words_of(zeros.T - less, bits),
            "scales": scales.T.half().contiguous(),
            "g_idx": (back // GROUP).to(torch.int32),
        }
        return stored, meant(whole, zeros, scales)[:, back]

    return make


def packed(symmetric: bool) -> Callable[[Tensor], Made]:
    def make(weight: Tensor) -> Made:
        whole, zeros, scales = random_groups(weight, 4)
        if symmetric:
            zeros = torch.full_like(zeros, 8)
        stored = {
            "weight_packed": words_of(whole, 4),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            stored["weight_zero_point"] = words_of(zeros.T, 4).T.contiguous()
        return stored, meant(whole, zeros, scales)

    return make


def channels(kind: torch.dtype) -> Callable[[Tensor], Made]:
    def make(weight: Tensor) -> Made:
        scale = weight.abs().amax(1, keepdim=True) / 120
        rounded = (weight / scale).round().to(kind) if kind == torch.int8 else (weight / scale).to(kind)
        return {"weight": rounded, "weight_scale": scale}, rounded.float() * scale

    return make


def tensorwise(weight: Tensor) -> Made:
    scale = weight.abs().max() / 400
    rounded = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": rounded, "weight_scale": scale.reshape(1)}, rounded.float() * scale


def blocks(weight: Tensor) -> Made:
    """Blocks of 48 × 48, the last ones cut off."""
    rows, columns = (-(-n // 48) for n in weight.shape)
    scales = torch.rand(rows, columns) + 0.5
    spread = scales.repeat_interleave(48, 0).repeat_interleave(48, 1)[: weight.shape[0], : weight.shape[1]]
    rounded = (weight / spread).to(torch.float8_e4m3fn)
    return {"weight": rounded, "weight_scale_inv": scales}, rounded.float() * spread


def compressed(form: str, bits: int, **weights: Any) -> dict[str, Any]:
    group = {"weights": {"num_bits": bits, **weights}, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


FORMATS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Made]]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, awq),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP}, gptq(4, 1)),
    "gptq-8": ({"quant_method": "gptq", "bits": 8, "group_size": GROUP}, gptq(8, 1)),
    "gptq-order": ({"quant_method": "gptq", "bits": 4, "desc_act": True}, gptq(4, 1, by_activations=True)),
    "gptq-v2": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, gptq(4, 0)),
    "packed": (compressed("pack-quantized", 4, symmetric=True), packed(True)),
    "packed-zeros": (compressed("pack-quantized", 4, symmetric=False), packed(False)),
    "int8": (compressed("int-quantized", 8, symmetric=True), channels(torch.int8)),
    "fp8": (compressed("float-quantized", 8, type="float"), channels(torch.float8_e4m3fn)),
    "fp8-tensor": (compressed("naive-quantized", 8, type="float"), tensorwise),
    "fp8-blocks": ({"quant_method": "fp8", "weight_block_size": [48, 48]}, blocks),
}


def quantise(folder: Path, form: str, kind: str = "llama", **more: Any) -> Any:
    """A tiny model whose folder holds its linears in few bits; returns the model that they stand for."""
    model = build_model(kind, folder, **SIZES, **more)
    settings, make = FORMATS[form]
    file, tensors, said = folder / "model.safetensors", {}, {}
    for name, value in load_file(folder / "model.safetensors").items():
        if value.ndim == 2 and "layers" in name and "gate.weight" not in name:
            stored, said[name] = make(value)
            tensors |= {f"{name.removesuffix('weight')}{end}": one for end, one in stored.items()}
        else:
            tensors[name] = value
    assert len(said) >= 21
    save_file(load_file(file) | said, file)
    whole = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    save_file(tensors, file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return whole


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
