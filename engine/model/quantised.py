"""Checkpoints whose linears are stored in few bits: which are read, and what shapes they stand for.

Of each linear several tensors are stored (`X.qweight`, `X.scales`, …); here they become one, `X.weight`, which
`engine.model.dequantise` computes when it is read. What follows (merging, cutting, packing) sees plain weights; the
kernels round them anew where `--quantization` asks for it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.model.checkpoint import Stored

WORD = 32  # bits


@dataclass(frozen=True, slots=True)
class Scheme:
    """A format.

    kind: awq, gptq, packed or scaled; ends: of the names of a linear's tensors, the first is always there;
    less: what stored zero points are short of; block: (outputs, inputs) that share a scale, if shapes don't tell.
    """

    kind: str
    ends: tuple[str, ...]
    bits: int = 8
    symmetric: bool = True
    less: int = 0
    block: tuple[int, int] | None = None

    def shape(self, parts: Mapping[str, Stored]) -> tuple[int, int]:
        """[outputs, inputs] of the weight."""
        rows, columns = parts[self.ends[0]].shape
        many = WORD // self.bits
        return {
            "awq": (columns * many, rows),
            "gptq": (columns, rows * many),
            "packed": (rows, columns * many),
            "scaled": (rows, columns),
        }[self.kind]


@dataclass(frozen=True, slots=True)
class Rounded:
    """A linear's weight in few bits: the tensors that stand for it, by the ends of their names."""

    parts: Mapping[str, Stored]
    scheme: Scheme
    shape: tuple[int, ...]

    @property
    def kind(self) -> str:
        """The dtype it is computed in."""
        return "float32"

    @property
    def numbers(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def bytes(self) -> int:
        """As stored."""
        return sum(part.bytes for part in self.parts.values())


def settings_of(config: Any) -> Mapping[str, Any] | None:
    """A model config's `quantization_config` as a mapping; None if its weights are plain."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    return found if isinstance(found, Mapping) else found.to_dict()


def refusal(settings: Mapping[str, Any]) -> str | None:
    """Why a checkpoint with this `quantization_config` can't be read, as the end of a sentence; None if it can."""
    found = _scheme(settings)
    return found if isinstance(found, str) else None


def as_weights(stored: Mapping[str, Stored], settings: Mapping[str, Any] | None) -> dict[str, Stored | Rounded]:
    """A checkpoint's tensors, with one weight for each linear in few bits; a layer that was left alone stays plain."""
    if settings is None:
        return dict(stored)
    scheme = _scheme(settings)
    assert isinstance(scheme, Scheme), scheme
    scales = tuple(f".{end}" for end in scheme.ends if "scale" in end)
    linears = {name.rpartition(".")[0] for name in stored if name.endswith(scales)}
    found: dict[str, Stored | Rounded] = {}
    for name, one in stored.items():
        linear, _, end = name.rpartition(".")
        if linear not in linears or end not in scheme.ends:
            found[name] = one
        elif end == scheme.ends[0]:
            parts = {end: stored[f"{linear}.{end}"] for end in scheme.ends if f"{linear}.{end}" in stored}
            found[f"{linear}.weight"] = Rounded(parts, scheme, scheme.shape(parts))
    return found


def _scheme(settings: Mapping[str, Any]) -> Scheme | str:
    method = str(settings.get("quant_method", "")).replace("_", "-")
    if method == "awq":
        if settings.get("bits", 4) != 4 or str(settings.get("version", "gemm")).lower() != "gemm":
            return "its AWQ weights aren't of 4 bits in the gemm layout"
        return Scheme("awq", ("qweight", "scales", "qzeros"), 4)
    if method in ("gptq", "gptqmodel"):
        bits = settings.get("bits")
        if bits not in (4, 8):
            return f"its GPTQ weights have {bits} bits; 4 and 8 are read"
        less = int(settings.get("checkpoint_format", "gptq") != "gptq_v2")
        return Scheme("gptq", ("qweight", "scales", "qzeros", "g_idx"), bits, less=less)
    if method == "compressed-tensors":
        return _compressed(settings)
    if method in ("fp8", "fbgemm-fp8"):
        block = settings.get("weight_block_size")
        return Scheme(
            "scaled", ("weight", "weight_scale_inv", "weight_scale"), block=(block[0], block[1]) if block else None
        )
    return f"its weights are quantised by {method or 'a method without a name'}, which isn't supported"


def _compressed(settings: Mapping[str, Any]) -> Scheme | str:
    form = str(settings.get("format", ""))
    weights = [group.get("weights") or {} for group in (settings.get("config_groups") or {}).values()]
    kinds = {
        (one.get("num_bits"), bool(one.get("symmetric", True)), str(one.get("block_structure"))) for one in weights
    }
    if any(one.get("actorder") not in (None, False, "weight", "static") for one in weights):
        return "its compressed-tensors weights are grouped by activations, which isn't supported"
    if len(kinds) != 1:
        return f"its compressed-tensors weights are of {len(kinds)} kinds; one is read"
    bits, symmetric, structure = kinds.pop()
    blocks = re.findall(r"\d+", structure)
    block = (int(blocks[0]), int(blocks[1])) if len(blocks) == 2 else None
    if form == "pack-quantized" and bits in (4, 8):
        ends = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
        return Scheme("packed", ends, bits, symmetric)
    if form in ("int-quantized", "float-quantized", "naive-quantized") and bits == 8:
        return Scheme("scaled", ("weight", "weight_scale", "weight_zero_point"), bits, symmetric, block=block)
    return f"its compressed-tensors weights are of format {form or 'none'} with {bits} bits, which isn't supported"
