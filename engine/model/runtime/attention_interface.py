"""Replaces the attention of transformers' classes by paged attention, through their attention interface.

transformers calls the attention by name, with the module of the layer. What an attention layer needs beyond that (the
requests of the batch, the KV cache) is in a forward context, which belongs to the thread that runs the model.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from engine.arrays import Int64s
from engine.kernels import attention
from engine.kernels.attention import Layout, Plan, Ragged, Scores, Span, Workspace
from engine.model.kv_groups import KVGroups

ATTENTION = "redline_paged"


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros whose pages the system allocates on first use, so that a large cache costs no start-up time."""
    integer = {2: np.int16, 4: np.int32}[dtype.itemsize]
    return torch.from_numpy(np.zeros(shape, dtype=integer)).view(dtype)


class KVCache:
    """Keys and values for all layer slots of a block: one tensor [blocks, kv heads, block size, head dim] per slot.

    A cache in 8 bits has scales besides, float32 [blocks, kv heads, block size] per slot, else None per slot.

    Args:
        zeros: allocates a tensor of zeros.
        stored: a dtype of 8 bits for keys and values; None: that of the layout.
    """

    def __init__(
        self,
        groups: KVGroups,
        blocks: int,
        layout: Layout,
        zeros: Callable[[tuple[int, ...], torch.dtype], Tensor] = lazy_zeros,
        stored: torch.dtype | None = None,
    ):
        self.groups = groups
        self.layout = layout
        count, shape = groups.group_size, (blocks, layout.kv_heads, layout.block_size, layout.head_dim)
        self.keys = [zeros(shape, stored or layout.dtype) for _ in range(count)]
        self.values = [zeros(shape, stored or layout.dtype) for _ in range(count)]
        self.key_scales: list[Tensor | None] = [None] * count
        self.value_scales: list[Tensor | None] = [None] * count
        if stored is not None:
            self.key_scales = [zeros(shape[:3], torch.float32) for _ in range(count)]
            self.value_scales = [zeros(shape[:3], torch.float32) for _ in range(count)]

    def check_window(self, group: int, window: int | None) -> None:
        """Check that a KV group keeps the tokens that a layer attends to: the last `window`, None for all."""
        kept = self.groups.windows[group]
        if kept and not (window and window <= kept):
            raise RuntimeError(f"a layer attends to {window or 'all'} tokens, but its config has a window of {kept}")


class AttentionContext(Protocol):
    """One step as the attention layers see it."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None, scores: Scores
    ) -> Tensor:
        """Store a layer's keys and values of the step, and attend to the last `window` tokens, None for all.

        Args:
            query: [tokens, heads, head dim]; contiguous. The result has this shape too.
            key, value: [tokens, kv heads, head dim].
        """
        ...


@dataclass(slots=True)
class ForwardContext:
    """One step as the attention layers see it. `ragged` and `write_index` have one entry per KV group."""

    cache: KVCache
    ragged: list[Ragged]
    write_index: list[Tensor]
    workspace: Workspace
    spans: Sequence[Span] = ()
    plans: dict[tuple[int, int | None], Plan] = field(default_factory=dict)  # by group and window
    layers_seen: set[int] = field(default_factory=set)

    @classmethod
    def build(
        cls,
        cache: KVCache,
        ragged: Ragged,
        row_of: Int64s,
        positions: Int64s,
        workspace: Workspace,
        spans: Sequence[Span] = (),
    ) -> "ForwardContext":
        """Build the context of a step.

        Args:
            cache: the KV cache.
            ragged: the batch; its block tables are [groups, rows, blocks].
            row_of: [tokens], the row of the batch that each token belongs to.
            positions: [tokens], in the request.
            workspace: buffers that the attention reuses.
            spans: tokens that attend to each other.
        """
        each = [replace(ragged, tables=table) for table in ragged.tables]
        index = [attention.write_index(table, row_of, positions, cache.layout) for table in ragged.tables]
        return cls(cache, each, index, workspace, spans)

    def plan(self, group: int, window: int | None) -> Plan:
        """The attention plan of a KV group, made once per step and window."""
        if (group, window) not in self.plans:
            self.cache.check_window(group, window)
            ragged, layout = self.ragged[group], self.cache.layout
            self.plans[group, window] = attention.make_plan(ragged, layout, window, self.spans)
        return self.plans[group, window]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None, scores: Scores
    ) -> Tensor:
        """See `AttentionContext`."""
        self.layers_seen.add(layer)
        group, slot = self.cache.groups.places[layer]
        keys, values, index = self.cache.keys[slot], self.cache.values[slot], self.write_index[group]
        attention.write(keys, index, key)
        attention.write(values, index, value)
        return attention.attend(query, keys, values, self.plan(group, window), scores, self.workspace)


_local = threading.local()


def run_model(model: nn.Module, context: AttentionContext, arguments: dict[str, Any]) -> Any:
    """Call the model with `context` as the context of its attention layers."""
    _local.context = context
    try:
        return model(**arguments)
    finally:
        _local.context = None


def register() -> None:
    """Register the attention with transformers under the name ATTENTION.

    No mask function is registered with it, so the models build no masks.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _paged_attention)


def _paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _: Tensor | None = None,  # the mask, which is not built
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: the attention layer.
        query: [1, heads, tokens, head dim].
        key, value: [1, kv heads, tokens, head dim].
        options: scaling, sliding_window, softcap, s_aux (sinks). The window is only read from here, because some
            classes have an attribute of that name on layers without a window too.

    Returns:
        [1, tokens, heads, head dim] and None for the attention weights.
    """
    context: AttentionContext = _local.context
    width, head_dim = value.shape[-1], key.shape[-1]
    if width < head_dim:  # DeepSeek's values are shorter than its keys
        value = torch.nn.functional.pad(value, (0, head_dim - width))
    scaling = options.get("scaling")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    scores = Scores(scaling, options.get("softcap"), options.get("s_aux"))
    layer: int = module.layer_idx  # type: ignore[assignment]
    q, k, v = query[0].transpose(0, 1).contiguous(), key[0].transpose(0, 1), value[0].transpose(0, 1)
    return context.attend(layer, q, k, v, options.get("sliding_window"), scores)[None, ..., :width], None
