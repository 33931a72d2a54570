"""Adapters (LoRA) in the layout of the C++ kernels, see lora.h."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.errors import ModelError
from engine.kernels.cpu.bindings import ADAPTED, PackedAdapter, PackedLowRank, StackSpec
from engine.kernels.cpu.packing import interleave, to_panels
from engine.model.lora import Adapter, LowRank

_LAYER = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)")


def by_layer(adapter: Adapter, layers: int) -> list[dict[str, LowRank]]:
    """An adapter's parts for each layer by the name of the linear; raises ModelError for what is in no layer."""
    found: list[dict[str, LowRank]] = [{} for _ in range(layers)]
    for path, part in adapter.linears.items():
        place = _LAYER.fullmatch(path)
        if place is None or int(place[1]) >= layers:
            raise ModelError(f"the adapter adds to {path}, which the fused stack hasn't got")
        found[int(place[1])][place[2]] = part
    return found


def pack_adapter(layers: Sequence[Mapping[str, LowRank]], spec: StackSpec) -> PackedAdapter:
    """Pack an adapter, for each layer of the model by the name of the linear (`q_proj`, …).

    `spec` is the model's, or the share of one rank, to which the adapter has been cut: `up` along the outputs of q, k,
    v, gate and up, `down` along the inputs of o and down. Raises ModelError for a linear that the model hasn't got in
    that size.
    """
    if len(layers) != spec.layers:
        raise ModelError(f"the adapter has {len(layers)} layers, the model {spec.layers}")
    places = _places(spec)
    packed = (PackedLowRank * (len(layers) * len(ADAPTED)))()
    kept: list[Any] = []
    for i, layer in enumerate(layers):
        _check(i, layer, places)
        for j, place in enumerate(places):
            whole = _side_by_side(layer, place.outputs)
            if whole is None:
                continue
            up = interleave(*whole.up.chunk(2)) if ADAPTED[j] == "gate_up" else whole.up
            arrays = whole.down.contiguous(), to_panels(up)
            kept += arrays
            packed[i * len(ADAPTED) + j] = PackedLowRank(*(array.data_ptr() for array in arrays), len(whole.down))
    return PackedAdapter(packed, max(one.rank for one in packed), kept)


@dataclass(frozen=True, slots=True)
class _Place:
    """Linears that lie side by side."""

    inputs: int
    outputs: dict[str, int]


def _places(spec: StackSpec) -> tuple[_Place, ...]:
    """In the order of ADAPTED."""
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
            raise ModelError(f"the adapter's layer {number} adds to {name!r}, the model has {', '.join(known)}")
        inputs, outputs = known[name]
        rank = len(part.down)
        if part.down.shape != (rank, inputs) or part.up.shape != (outputs, rank):
            raise ModelError(
                f"the adapter's layer {number} adds to {name} by weights of {tuple(part.down.shape)} and "
                f"{tuple(part.up.shape)}, the model takes {(rank, inputs)} and {(outputs, rank)}"
            )


def _side_by_side(layer: Mapping[str, LowRank], outputs: Mapping[str, int]) -> LowRank | None:
    there = [layer[name] for name in outputs if name in layer]
    if not there:
        return None
    down = torch.cat([part.down.float() for part in there])
    up = down.new_zeros(sum(outputs.values()), len(down))
    row = rank = 0
    for name, count in outputs.items():
        if name in layer:
            part = layer[name].up
            up[row : row + count, rank : rank + part.shape[1]] = part
            rank += part.shape[1]
        row += count
    return LowRank(down, up)
