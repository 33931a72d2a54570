"""Packs LoRA adapters for the C++ kernels (layout in lora.h)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.errors import ModelError
from engine.kernels.cpu.bindings import ADAPTED, PackedAdapter, PackedLowRank, StackSpec
from engine.kernels.cpu.packing import interleave, to_panels
from engine.model.lora.lora_weights import Adapter, LowRank

# Models with encoders have their decoder at `model.language_model` or `model.text_model`.
_LAYER = re.compile(r"model\.(?:language_model\.|text_model\.)?layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)")


def by_layer(adapter: Adapter, layers: range) -> list[dict[str, LowRank]]:
    """Group an adapter's linears by layer, keyed by name. Raises ModelError for a linear outside the layers.

    `layers`: the numbers of those that this rank has.
    """
    found: list[dict[str, LowRank]] = [{} for _ in layers]
    for path, part in adapter.linears.items():
        place = _LAYER.fullmatch(path)
        if place is None or int(place[1]) not in layers:
            raise ModelError(f"the adapter changes {path}, which the C++ kernels do not support (--kernels torch does)")
        found[int(place[1]) - layers.start][place[2]] = part
    return found


def pack_adapter(layers: Sequence[Mapping[str, LowRank]], spec: StackSpec) -> PackedAdapter:
    """Pack an adapter. Raises ModelError for a linear that the model does not have in that shape.

    Args:
        layers: for each layer of the model, the adapter's weights by the name of the linear (`q_proj`, …).
        spec: of the model, or of a rank's shard; then the adapter is that rank's shard too.
    """
    if len(layers) != spec.layers:
        raise ModelError(f"the adapter has {len(layers)} layers, the model {spec.layers}")
    places = _places(spec)
    packed = (PackedLowRank * (len(layers) * len(ADAPTED)))()
    kept: list[Any] = []
    for i, layer in enumerate(layers):
        _check(i, layer, places)
        for j, place in enumerate(places):
            merged = merge(layer, place.outputs)
            if merged is None:
                continue
            up = interleave(*merged.up.chunk(2)) if ADAPTED[j] == "gate_up" else merged.up
            arrays = merged.down.contiguous(), to_panels(up)
            kept += arrays
            packed[i * len(ADAPTED) + j] = PackedLowRank(*(array.data_ptr() for array in arrays), len(merged.down))
    return PackedAdapter(packed, max(one.rank for one in packed), kept)


@dataclass(frozen=True, slots=True)
class _Place:
    """Linears that the kernels compute as one; `outputs` has the size of each by its name."""

    inputs: int
    outputs: dict[str, int]


def _places(spec: StackSpec) -> tuple[_Place, ...]:
    """The places of a layer, in the order of ADAPTED."""
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    return (
        _Place(spec.hidden, {"q_proj": queries, "k_proj": keys, "v_proj": keys}),
        _Place(queries, {"o_proj": spec.hidden}),
        _Place(spec.hidden, {"gate_proj": spec.intermediate, "up_proj": spec.intermediate}),
        _Place(spec.intermediate, {"down_proj": spec.hidden}),
    )


def _check(number: int, layer: Mapping[str, LowRank], places: Sequence[_Place]) -> None:
    known = {name: (place.inputs, outputs) for place in places for name, outputs in place.outputs.items()}
    for name, part in layer.items():
        if name not in known:
            raise ModelError(f"the adapter changes {name!r} in layer {number}, but the model has {', '.join(known)}")
        inputs, outputs = known[name]
        rank = len(part.down)
        if part.down.shape != (rank, inputs) or part.up.shape != (outputs, rank):
            raise ModelError(
                f"the adapter's weights of {name} in layer {number} have shapes {tuple(part.down.shape)} and "
                f"{tuple(part.up.shape)}, the model needs {(rank, inputs)} and {(outputs, rank)}"
            )


def merge(layer: Mapping[str, LowRank], outputs: Mapping[str, int]) -> LowRank | None:
    """Merge the adapter's weights of linears that are computed as one; None if it changes none of them.

    `down` are concatenated, `up` form a block matrix with zeros elsewhere; the ranks add up.
    """
    present = [layer[name] for name in outputs if name in layer]
    if not present:
        return None
    down = torch.cat([part.down.float() for part in present])
    up = down.new_zeros(sum(outputs.values()), len(down))
    row = rank = 0
    for name, count in outputs.items():
        if name in layer:
            part = layer[name].up
            up[row : row + count, rank : rank + part.shape[1]] = part
            rank += part.shape[1]
        row += count
    return LowRank(down, up)
