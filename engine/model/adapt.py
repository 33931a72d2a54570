"""Plugs the paged attention into transformers' classes: they call it by name, with a module that knows its layer.

What an attention layer can't be told through the model's own forward (the batch's rows, the cache) waits in a forward
context that belongs to the thread that runs the model.
"""

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.kernels import attention
from engine.kernels.attention import Layout, Plan, Ragged, Scores, Workspace

ATTENTION = "redline_paged"


class KVCache:
    """Keys and values of all layers: one tensor `[blocks, kv heads, block, head dim]` each."""

    def __init__(self, layers: int, blocks: int, layout: Layout):
        self.layout = layout
        shape = (blocks, layout.kv_heads, layout.block_size, layout.head_dim)
        self.keys = [_lazy_zeros(shape, layout.dtype) for _ in range(layers)]
        self.values = [_lazy_zeros(shape, layout.dtype) for _ in range(layers)]


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros whose pages the system supplies on first use, so that a large pool costs no start-up time."""
    kind = {2: np.int16, 4: np.int32}[dtype.itemsize]
    return torch.from_numpy(np.zeros(shape, dtype=kind)).view(dtype)


@dataclass(slots=True)
class Forward:
    """One step as the attention layers see it."""

    cache: KVCache
    ragged: Ragged
    write_index: Tensor
    workspace: Workspace
    plans: dict[int | None, Plan] = field(default_factory=dict)  # by window
    layers_seen: set[int] = field(default_factory=set)

    def plan(self, window: int | None) -> Plan:
        if window not in self.plans:
            self.plans[window] = attention.make_plan(self.ragged, self.cache.layout, window)
        return self.plans[window]


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
    keys, values = cache.keys[layer], cache.values[layer]
    width = value.shape[-1]
    if width < cache.layout.head_dim:  # DeepSeek's values are shorter than its keys
        value = torch.nn.functional.pad(value, (0, cache.layout.head_dim - width))
    attention.write(keys, forward.write_index, key[0].transpose(0, 1))
    attention.write(values, forward.write_index, value[0].transpose(0, 1))
    scaling = options.get("scaling")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    scores = Scores(scaling, options.get("softcap"), options.get("s_aux"))
    plan = forward.plan(options.get("sliding_window"))
    q = query[0].transpose(0, 1).contiguous()
    return attention.attend(q, keys, values, plan, scores, forward.workspace)[None, ..., :width], None
