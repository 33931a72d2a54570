"""Tiny quantized checkpoints, written as the formats define them, and the models that they stand for."""

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
Stored = tuple[dict[str, Tensor], Tensor]  # the stored tensors, and the weight that they stand for
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output in each position of a word


def put(words: Tensor, slot: int, bits: int, values: Tensor) -> None:
    """Write values into one position of 32-bit words."""
    words |= (values.long() << (slot * bits)).to(torch.int64)


def words_of(columns: Tensor, bits: int, order: tuple[int, ...] = ()) -> Tensor:
    """Pack values [n, m] into words [n, m * bits / 32], the first value in the lowest bits."""
    many = 32 // bits
    words = torch.zeros(columns.shape[0], columns.shape[1] // many, dtype=torch.int64)
    for slot, which in enumerate(order or range(many)):
        put(words, slot, bits, columns[:, which::many])
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def quantize_groups(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight: integers [outputs, inputs], zero points and scales [outputs, groups]."""
    grouped = weight.unflatten(1, (-1, GROUP))
    low, high = grouped.amin(2), grouped.amax(2)
    scales = ((high - low) / ((1 << bits) - 1)).half().float()
    zeros = (-low / scales).round().clamp(1, (1 << bits) - 1)
    values = (grouped / scales[..., None] + zeros[..., None]).round().clamp(0, (1 << bits) - 1)
    return values.flatten(1).long(), zeros.long(), scales


def dequantized(values: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    return ((values.unflatten(1, (zeros.shape[1], -1)) - zeros[..., None]) * scales[..., None]).flatten(1)


def awq(weight: Tensor) -> Stored:
    values, zeros, scales = quantize_groups(weight, 4)
    stored = {
        "qweight": words_of(values.T, 4, AWQ_ORDER),
        "qzeros": words_of(zeros.T, 4, AWQ_ORDER),
        "scales": scales.T.half().contiguous(),
    }
    return stored, dequantized(values, zeros, scales)


def gptq(bits: int, offset: int, act_order: bool = False) -> Callable[[Tensor], Stored]:
    def make(weight: Tensor) -> Stored:
        inputs = weight.shape[1]
        order = torch.randperm(inputs) if act_order else torch.arange(inputs)
        values, zeros, scales = quantize_groups(weight[:, order], bits)
        back = order.argsort()
        stored = {
            "qweight": words_of(values[:, back], bits).T.contiguous(),
            "qzeros": words_of(zeros.T - offset, bits),
            "scales": scales.T.half().contiguous(),
            "g_idx": (back // GROUP).to(torch.int32),
        }
        return stored, dequantized(values, zeros, scales)[:, back]

    return make


def packed(symmetric: bool) -> Callable[[Tensor], Stored]:
    def make(weight: Tensor) -> Stored:
        values, zeros, scales = quantize_groups(weight, 4)
        if symmetric:
            zeros = torch.full_like(zeros, 8)
        stored = {
            "weight_packed": words_of(values, 4),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            stored["weight_zero_point"] = words_of(zeros.T, 4).T.contiguous()
        return stored, dequantized(values, zeros, scales)

    return make


def channels(kind: torch.dtype) -> Callable[[Tensor], Stored]:
    def make(weight: Tensor) -> Stored:
        scale = weight.abs().amax(1, keepdim=True) / 120
        quantized = (weight / scale).round().to(kind) if kind == torch.int8 else (weight / scale).to(kind)
        return {"weight": quantized, "weight_scale": scale}, quantized.float() * scale

    return make


def tensorwise(weight: Tensor) -> Stored:
    scale = weight.abs().max() / 400
    quantized = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": quantized, "weight_scale": scale.reshape(1)}, quantized.float() * scale


def blocks(weight: Tensor) -> Stored:
    """Blocks of 48 × 48; the last ones are smaller."""
    rows, columns = (-(-n // 48) for n in weight.shape)
    scales = torch.rand(rows, columns) + 0.5
    spread = scales.repeat_interleave(48, 0).repeat_interleave(48, 1)[: weight.shape[0], : weight.shape[1]]
    quantized = (weight / spread).to(torch.float8_e4m3fn)
    return {"weight": quantized, "weight_scale_inv": scales}, quantized.float() * spread


def compressed(form: str, bits: int, **weights: Any) -> dict[str, Any]:
    group = {"weights": {"num_bits": bits, **weights}, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


FORMATS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Stored]]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, awq),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP}, gptq(4, 1)),
    "gptq-8": ({"quant_method": "gptq", "bits": 8, "group_size": GROUP}, gptq(8, 1)),
    "gptq-order": ({"quant_method": "gptq", "bits": 4, "desc_act": True}, gptq(4, 1, act_order=True)),
    "gptq-v2": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, gptq(4, 0)),
    "packed": (compressed("pack-quantized", 4, symmetric=True), packed(True)),
    "packed-zeros": (compressed("pack-quantized", 4, symmetric=False), packed(False)),
    "int8": (compressed("int-quantized", 8, symmetric=True), channels(torch.int8)),
    "fp8": (compressed("float-quantized", 8, type="float"), channels(torch.float8_e4m3fn)),
    "fp8-tensor": (compressed("naive-quantized", 8, type="float"), tensorwise),
    "fp8-blocks": ({"quant_method": "fp8", "weight_block_size": [48, 48]}, blocks),
}


def quantize(folder: Path, form: str, kind: str = "llama", **more: Any) -> Any:
    """Write a tiny model with quantized linears; returns the model of the weights that they stand for."""
    model = build_model(kind, folder, **SIZES, **more)
    quantization, make = FORMATS[form]
    file, tensors, dense = folder / "model.safetensors", {}, {}
    for name, value in load_file(folder / "model.safetensors").items():
        if value.ndim == 2 and "layers" in name and "gate.weight" not in name:
            stored, dense[name] = make(value)
            tensors |= {f"{name.removesuffix('weight')}{suffix}": one for suffix, one in stored.items()}
        else:
            tensors[name] = value
    assert len(dense) >= 21
    save_file(load_file(file) | dense, file)
    reference = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    save_file(tensors, file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return reference
