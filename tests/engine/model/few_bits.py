"""Tiny checkpoints in few bits, and the models that they stand for: from what the formats say, not from our reader."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.engine.worker.driver import build_model

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
