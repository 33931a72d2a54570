"""Quantized checkpoints: which formats are supported, and which tensors make up the weight of a linear.

A quantized linear is stored as several tensors (`X.qweight`, `X.scales`, …). `merge_quantized` presents them as one
tensor, `X.weight`, which `dequantize.py` computes when it is read. Everything after that (name mapping, sharding,
packing) sees plain weights; the C++ kernels quantize them again if `--quantization` is given.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.model.checkpoints.safetensors_headers import StoredTensor

WORD = 32  # bits of the integers that hold packed values


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """A storage format of quantized weights.

    Args:
        layout: awq, gptq, packed or scaled; selects the functions for shape and values.
        suffixes: names of a linear's tensors after its path; the first one always exists.
        bits: per weight.
        symmetric: no zero points are stored.
        zero_point_offset: added to the stored zero points.
        block_shape: (outputs, inputs) that share a scale, if the shape of the scales does not determine it.
    """

    layout: str
    suffixes: tuple[str, ...]
    bits: int = 8
    symmetric: bool = True
    zero_point_offset: int = 0
    block_shape: tuple[int, int] | None = None

    def shape(self, parts: Mapping[str, StoredTensor]) -> tuple[int, int]:
        """[outputs, inputs] of the weight."""
        rows, columns = parts[self.suffixes[0]].shape
        per_word = WORD // self.bits
        return {
            "awq": (columns * per_word, rows),
            "gptq": (columns, rows * per_word),
            "packed": (rows, columns * per_word),
            "scaled": (rows, columns),
        }[self.layout]


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A linear's weight as stored tensors, keyed by the suffix of their names; `shape` is [outputs, inputs]."""

    parts: Mapping[str, StoredTensor]
    scheme: QuantScheme
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """Name of the dtype that it is dequantized to."""
        return "float32"

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return sum(part.nbytes for part in self.parts.values())


def quantization_config(hf_config: Any) -> Mapping[str, Any] | None:
    """A model config's `quantization_config` as a mapping; None if the weights are not quantized."""
    found = getattr(hf_config, "quantization_config", None)
    if not found:
        return None
    return found if isinstance(found, Mapping) else found.to_dict()


def unsupported_quantization(config: Mapping[str, Any]) -> str | None:
    """Why a checkpoint with this `quantization_config` can't be read, as the end of a sentence; None if it can."""
    scheme = _scheme(config)
    return scheme if isinstance(scheme, str) else None


def merge_quantized(
    stored: Mapping[str, StoredTensor], config: Mapping[str, Any] | None
) -> dict[str, StoredTensor | QuantizedWeight]:
    """Replace the tensors of each quantized linear by one weight; other tensors stay as they are.

    `config` is the `quantization_config`, None for a checkpoint that is not quantized.
    """
    if config is None:
        return dict(stored)
    scheme = _scheme(config)
    assert isinstance(scheme, QuantScheme), scheme
    scales = tuple(f".{suffix}" for suffix in scheme.suffixes if "scale" in suffix)
    linears = {name.rpartition(".")[0] for name in stored if name.endswith(scales)}
    merged: dict[str, StoredTensor | QuantizedWeight] = {}
    for name, tensor in stored.items():
        linear, _, suffix = name.rpartition(".")
        if linear not in linears or suffix not in scheme.suffixes:
            merged[name] = tensor
        elif suffix == scheme.suffixes[0]:
            parts = {one: stored[f"{linear}.{one}"] for one in scheme.suffixes if f"{linear}.{one}" in stored}
            merged[f"{linear}.weight"] = QuantizedWeight(parts, scheme, scheme.shape(parts))
    return merged


def _scheme(config: Mapping[str, Any]) -> QuantScheme | str:
    """The scheme of a `quantization_config`, or why it is not supported."""
    method = str(config.get("quant_method", "")).replace("_", "-")
    if method == "awq":
        if config.get("bits", 4) != 4 or str(config.get("version", "gemm")).lower() != "gemm":
            return "its AWQ weights aren't of 4 bits in the gemm layout"
        return QuantScheme("awq", ("qweight", "scales", "qzeros"), 4)
    if method in ("gptq", "gptqmodel"):
        bits = config.get("bits")
        if bits not in (4, 8):
            return f"its GPTQ weights have {bits} bits; only 4 and 8 are supported"
        offset = int(config.get("checkpoint_format", "gptq") != "gptq_v2")
        return QuantScheme("gptq", ("qweight", "scales", "qzeros", "g_idx"), bits, zero_point_offset=offset)
    if method == "compressed-tensors":
        return _compressed_tensors(config)
    if method in ("fp8", "fbgemm-fp8"):
        block = config.get("weight_block_size")
        shape = (block[0], block[1]) if block else None
        return QuantScheme("scaled", ("weight", "weight_scale_inv", "weight_scale"), block_shape=shape)
    return f"its weights are quantized with {method or 'an unnamed method'}, which isn't supported"


def _compressed_tensors(config: Mapping[str, Any]) -> QuantScheme | str:
    form = str(config.get("format", ""))
    groups = [group.get("weights") or {} for group in (config.get("config_groups") or {}).values()]
    if any(one.get("actorder") not in (None, False, "weight", "static") for one in groups):
        return "its compressed-tensors weights are grouped by activation order, which isn't supported"
    schemes = {
        (one.get("num_bits"), bool(one.get("symmetric", True)), str(one.get("block_structure"))) for one in groups
    }
    if len(schemes) != 1:
        return f"its compressed-tensors weights have {len(schemes)} schemes; one is supported"
    bits, symmetric, structure = schemes.pop()
    block = re.findall(r"\d+", structure)
    block_shape = (int(block[0]), int(block[1])) if len(block) == 2 else None
    if form == "pack-quantized" and bits in (4, 8):
        parts: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
        return QuantScheme("packed", parts, bits, symmetric)
    if form in ("int-quantized", "float-quantized", "naive-quantized") and bits == 8:
        parts = ("weight", "weight_scale", "weight_zero_point")
        return QuantScheme("scaled", parts, bits, symmetric, block_shape=block_shape)
    return f"its compressed-tensors weights are of format {form or 'none'} with {bits} bits, which isn't supported"
