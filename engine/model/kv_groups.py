"""KV groups: the layers of a group have one window and share a block table, so blocks outside it can be freed.

All groups take blocks from one pool. A block holds the keys and values of `group_size` layers; if a group has fewer
layers, a part of its blocks stays empty. Example: six layers, every third one without a window:

    layer      0  1  2  3  4  5        group_size: 2
    window     w  w  0  w  w  0        windows: (0, w, w)
    group      1  1  0  2  2  0
    index      0  1  0  0  1  1        within the group
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.model.families import family_of

NOWHERE = (-1, -1)
MOST_PADDING = 0.15  # missing layers of groups, as a fraction of all layers; fewer groups need fewer block tables


@dataclass(frozen=True, slots=True)
class KVGroups:
    """How the layers of a model share its KV cache.

    Args:
        windows: tokens that a query sees, its own included, per group; 0 for all.
        group_size: layers whose keys and values a block can hold.
        places: group of each layer, and its index within the group; NOWHERE for layers of other pipeline stages.
    """

    windows: tuple[int, ...]
    group_size: int
    places: tuple[tuple[int, int], ...]


def group_layers(windows: Sequence[int]) -> KVGroups:
    """Form as few groups as MOST_PADDING allows, groups without a window first.

    `windows` has one entry for each layer with a KV cache; an encoder has none.
    """
    if not windows:
        return KVGroups((), 0, ())
    members = {window: [i for i, one in enumerate(windows) if one == window] for window in sorted(set(windows))}
    sizes = [len(layers) for layers in members.values()]
    most = (1 + MOST_PADDING) * len(windows)
    group_size = next(size for size in range(max(sizes), 0, -1) if sum(-(-n // size) * size for n in sizes) <= most)
    places = [(0, 0)] * len(windows)
    group_windows: list[int] = []
    for window, layers in members.items():
        for i, layer in enumerate(layers):
            places[layer] = len(group_windows) + i // group_size, i % group_size
        group_windows += [window] * -(-len(layers) // group_size)
    return KVGroups(tuple(group_windows), group_size, tuple(places))


def groups_of_stage(groups: KVGroups, layers: range) -> KVGroups:
    """The groups as a pipeline stage stores them: the block tables of all layers, and places for its own layers only.

    Example: for the layers 2 and 3 of the model above a block holds one layer, since they are in different groups.
    """
    sizes = [0] * len(groups.windows)
    places = [NOWHERE] * len(groups.places)
    for layer in layers:
        group = groups.places[layer][0]
        places[layer] = group, sizes[group]
        sizes[group] += 1
    return KVGroups(groups.windows, max(sizes, default=0), tuple(places))


def layer_windows(hf_config: Any, max_model_len: int) -> tuple[int, ...]:
    """The tokens that a query of each layer sees, its own included; 0 for all.

    A model type outside the parity suite gets no windows: which tokens its layers see is only known when they run.
    """
    layers, family = hf_config.num_hidden_layers, family_of(hf_config.model_type)
    window = getattr(hf_config, "sliding_window", None) or 0
    if family is None or not 0 < window < max_model_len:
        return (0,) * layers
    layer_types = getattr(hf_config, "layer_types", None)
    if layer_types is None:
        return (window if family.all_layers_windowed else 0,) * layers
    return tuple(window if one == "sliding_attention" else 0 for one in layer_types[:layers])
