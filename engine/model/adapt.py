"""Plugs the paged attention into transformers' classes: they call it by name, with a module that knows its layer.

What an attention layer can't be told through the model's own forward (the batch's rows, the cache) waits in a forward
context that belongs to the thread that runs the model.
"""

import threading
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.kernels import attention
from engine.kernels.attention import Int64s, Layout, Plan, Ragged, Scores, Workspace
from engine.model.kvgroups import KVGroups

ATTENTION = "redline_paged"


class KVCache:
    """Keys and values of as many layers as a block has room for: `[blocks, kv heads, block, head dim]` each."""

    def __init__(self, groups: KVGroups, blocks: int, layout: Layout):
        self.groups = groups
        self.layout = layout
        shape = (blocks, layout.kv_heads, layout.block_size, layout.head_dim)
        self.keys = [_lazy_zeros(shape, layout.dtype) for _ in range(groups.slots)]
        self.values = [_lazy_zeros(shape, layout.dtype) for _ in range(groups.slots)]


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros whose pages the system supplies on first use, so that a large pool costs no start-up time."""
    kind = {2: np.int16, 4: np.int32}[dtype.itemsize]
    return torch.from_numpy(np.zeros(shape, dtype=kind)).view(dtype)


@dataclass(slots=True)
class Forward:
    """One step as the attention layers see it."""

    cache: KVCache
    ragged: list[Ragged]  # of each KV group
    write_index: list[Tensor]  # of each KV group
    workspace: Workspace
    plans: dict[tuple[int, int | None], Plan] = field(default_factory=dict)  # by group and window
    layers_seen: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, cache: KVCache, ragged: Ragged, row_of: Int64s, positions: Int64s, workspace: Workspace) -> "Forward":
        """From rows with tables of all groups, [groups, rows, blocks]; row_of, positions: [tokens]."""
        each = [replace(ragged, tables=table) for table in ragged.tables]
        index = [attention.write_index(table, row_of, positions, cache.layout) for table in ragged.tables]
        return cls(cache, each, index, workspace)

    def plan(self, group: int, window: int | None) -> Plan:
        if (group, window) not in self.plans:
            kept = self.cache.groups.windows[group]
            if kept and not (window and window <= kept):
                raise RuntimeError(f"it sees {window or 'all'} tokens where its config says {kept}")
            self.plans[group, window] = attention.make_plan(self.ragged[group], self.cache.layout, window)
        return self.plans[group, window]


_local = threading.local()


def run(model: nn.Module, forward: Forward, arguments: dict[str, Any]) -> Any:
    """Call the model with `forward` as the context of its attention layers."""
    _local.forward = forward
    try:
        return model(**arguments)
    finally:
        _local.forward = None


def register() -> None:
    """Make the attention known to transformers under the name ATTENTION.

    No mask function goes with it, so the models build no masks.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _paged_attention)


def _paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _: Tensor | None = None,  # the mask, which isn't built
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query, key, value [1, heads, tokens, head dim] -> [1, tokens, heads, dim].

    Options: scaling, sliding_window, softcap, s_aux (sinks). The window comes from the call alone: some classes set an
    attribute of that name on full layers too.
    """
    forward: Forward = _local.forward
    layer: int = module.layer_idx  # type: ignore[assignment]
    forward.layers_seen.add(layer)
    cache = forward.cache
    group, slot = cache.groups.places[layer]
    keys, values, index = cache.keys[slot], cache.values[slot], forward.write_index[group]
    width = value.shape[-1]
    if width < cache.layout.head_dim:  # DeepSeek's values are shorter than its keys
        value = torch.nn.functional.pad(value, (0, cache.layout.head_dim - width))
    attention.write(keys, index, key[0].transpose(0, 1))
    attention.write(values, index, value[0].transpose(0, 1))
    scaling = options.get("scaling")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    scores = Scores(scaling, options.get("softcap"), options.get("s_aux"))
    plan = forward.plan(group, options.get("sliding_window"))
    q = query[0].transpose(0, 1).contiguous()
    return attention.attend(q, keys, values, plan, scores, forward.workspace)[None, ..., :width], None
