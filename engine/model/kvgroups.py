"""KV groups: layers that see equally far back share a block table, so that a window's blocks can be given back.

All groups take blocks from one pool. A block has room for the keys and values of `slots` layers, and so many layers
make a group; a group with fewer leaves slots empty. Six layers, of which every third sees all tokens:

    layer      0  1  2  3  4  5        slots: 2
    sees       w  w  ∞  w  w  ∞        windows: (0, w, w)
    group      1  1  0  2  2  0
    slot       0  1  0  0  1  1
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.model.families import FAMILIES

MOST_PADDING = 0.15  # of the slots: larger groups have fewer tables, which cost time in every step


@dataclass(frozen=True, slots=True)
class KVGroups:
    """How the layers of a model share its KV cache.

    windows: of each group, how many tokens a query sees, its own included; 0 for all. slots: layers a block has room
    for. places: of each layer, its group and its slot.
    """

    windows: tuple[int, ...]
    slots: int
    places: tuple[tuple[int, int], ...]


def group_layers(windows: Sequence[int]) -> KVGroups:
    """The fewest groups that waste little, those that see all tokens first; `windows` are the layers'."""
    members = {window: [i for i, one in enumerate(windows) if one == window] for window in sorted(set(windows))}
    sizes = [len(layers) for layers in members.values()]
    most = (1 + MOST_PADDING) * len(windows)
    slots = next(size for size in range(max(sizes), 0, -1) if sum(-(-n // size) * size for n in sizes) <= most)
    places = [(0, 0)] * len(windows)
    of_groups: list[int] = []
    for window, layers in members.items():
        for i, layer in enumerate(layers):
            places[layer] = len(of_groups) + i // slots, i % slots
        of_groups += [window] * -(-len(layers) // slots)
    return KVGroups(tuple(of_groups), slots, tuple(places))


def layer_windows(settings: Any, max_model_len: int) -> tuple[int, ...]:
    """How many tokens a query of each layer sees, its own included; 0 for all that a request may have.

    A kind of model that no parity test covers keeps all tokens: what its layers really see is only known when they run.
    """
    layers, family = settings.num_hidden_layers, FAMILIES.get(settings.model_type)
    window = getattr(settings, "sliding_window", None) or 0
    if family is None or not 0 < window < max_model_len:
        return (0,) * layers
    kinds = getattr(settings, "layer_types", None)
    if kinds is None:
        return (window if family.slides else 0,) * layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds[:layers])
