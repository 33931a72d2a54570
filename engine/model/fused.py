"""The fused stack: decoders of the Llama kind, packed from transformers' modules for the C++ kernels.

The generic path remains the reference; `refusal` says which models go it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.kernels.cpu.native import Layer, Linear, Spec
from engine.model.facts import cached_bytes
from engine.model.families import FAMILIES, Family
from engine.model.heap import give_back
from engine.model.kvgroups import KVGroups
from engine.model.packing import GROUPS, LANES, InTurns, Stacked, Weight, pack


@dataclass(frozen=True, slots=True)
class Form:
    """How a stack computes: formats of the layers' weights and of keys and values, as native.FORMATS names them.

    dtype: of what is kept plain.
    """

    dtype: str
    weights: str
    cache: str

    @property
    def head(self) -> str:
        """Four bits are too few for the head."""
        return "int8" if self.weights == "int4" else self.weights


HUGE_PAGE = 2 << 20
MOST_HEAD_DIM, MOST_HIDDEN = 256, 16384  # sizes of buffers in the kernels
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def refusal(model: Any, form: Form, block_size: int) -> str | None:
    """Why a model of transformers, whole or a rank's share, can't take the fused stack, as the end of a sentence."""
    settings = model.config
    if not FAMILIES.get(settings.model_type, Family()).fused:
        return f"models of kind {settings.model_type!r} have no fused stack"
    if form.dtype not in DTYPES:
        return f"the kernels have no {form.dtype}"
    for what, kind in (("weights", form.weights), ("caches", form.cache)):
        if kind != form.dtype != "bfloat16":
            return f"the kernels have {kind} {what} only beside --dtype bfloat16"
    if block_size % LANES:
        return f"--block-size {block_size} is no multiple of {LANES}"
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    width = attention.o_proj.weight.shape[1]
    step = GROUPS.get(form.weights, LANES)
    sizes = {
        "hidden size": (settings.hidden_size, max(step, GROUPS.get(form.head, LANES))),
        "MLP": (mlp.gate_proj.weight.shape[0], step),
        "attention": (width, step),
    }
    for what, (size, multiple) in sizes.items():
        if size % multiple:
            return f"its {what} of {size} numbers is no multiple of {multiple}"
    if attention.head_dim % LANES:
        return f"its heads of {attention.head_dim} numbers are no multiple of {LANES}"
    if attention.head_dim > MOST_HEAD_DIM or settings.hidden_size > MOST_HIDDEN:
        return (
            f"its heads ({attention.head_dim}) or hidden states ({settings.hidden_size}) are too large for the kernels"
        )
    if getattr(settings, "hidden_act", "silu") != "silu":
        return f"its activation is {settings.hidden_act}"
    if any(linear.bias is not None for linear in (mlp.gate_proj, mlp.up_proj)):
        return "its MLP has biases"
    return None


class Arena:
    """Memory in large pages, handed out in pieces at multiples of 64: a step reads all weights, page after page."""

    CHUNK = 64 << 20  # what isn't handed out of it is never touched, and so takes no memory

    def __init__(self) -> None:
        self._rest = np.zeros(0, dtype=np.uint8)

    def new(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Like torch.empty."""
        count = math.prod(shape) * dtype.itemsize
        size = -(-count // 64) * 64
        if size > len(self._rest):
            self._rest = lazy_zeros(max(size, self.CHUNK))
        piece, self._rest = self._rest[:count], self._rest[size:]
        return torch.from_numpy(piece).view(dtype).view(*shape)


@dataclass
class Packer:
    """Makes the kernels' structures and keeps what they point to."""

    kind: str  # of the layers' weights, see engine.model.packing
    kept: list[Any] = field(default_factory=list)
    arena: Arena = field(default_factory=Arena)

    def linear(self, weight: Weight, bias: Tensor | None = None, kind: str = "") -> Linear:
        """Of a weight [outputs, inputs]."""
        packed = pack(weight, kind or self.kind, self.arena.new)
        scales = None if packed.scales is None else self._at(packed.scales)
        return Linear(self._at(packed.panels), scales, self.floats(bias), *weight.shape)

    def linears(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Linear:
        """Of several side by side."""
        bias = None
        if any(one is not None for one in biases):
            each = zip(weights, biases, strict=True)
            bias = torch.cat([w.new_zeros(len(w)) if one is None else one.detach() for w, one in each])
        return self.linear(Stacked([one.detach() for one in weights]), bias)

    def floats(self, values: Tensor | None) -> int | None:
        return None if values is None else self._at(values.detach().float().contiguous())

    def _at(self, values: Tensor) -> int:
        self.kept.append(values)
        return values.data_ptr()


def make_spec(
    model: Any,
    form: Form,
    num_blocks: int,
    block_size: int,
    groups: KVGroups,
    *,
    partial: bool,
    first_token: int = 0,
    fill: Callable[[nn.Module], None] = lambda _: None,
) -> tuple[Spec, list[Any]]:
    """Pack a model of transformers, whole or one rank's share, with `num_blocks` of cache.

    `first_token` is the rank's first. `fill` gives a part of the model its numbers, if it hasn't any: a linear at
    a time is there twice, no more. The model is used up. Returns also what the spec points to.
    """
    packer = Packer(form.weights)
    inner, settings = model.model, model.config
    for part in (inner.embed_tokens, inner.norm, model.lm_head):
        fill(part)
    embedding, final_norm = _embedding(packer, model, form), packer.floats(inner.norm.weight)
    vocabulary = len(model.lm_head.weight)
    head = packer.linear(model.lm_head.weight.detach(), kind=form.head)
    _release(inner.embed_tokens, model.lm_head)
    first = inner.layers[0].self_attn
    head_dim = first.head_dim
    heads, kv_heads = (proj.weight.shape[0] // head_dim for proj in (first.q_proj, first.k_proj))
    intermediate = inner.layers[0].mlp.gate_proj.weight.shape[0]
    cache_bytes = num_blocks * kv_heads * block_size * cached_bytes(form.cache, head_dim)
    layers = (Layer * len(inner.layers))()
    cache = lazy_zeros(2 * groups.slots * cache_bytes)  # in one piece, so that all its pages can be large ones
    packer.kept.append(cache)
    for i, layer in enumerate(inner.layers):
        group, slot = groups.places[i]
        keys = cache.ctypes.data + 2 * slot * cache_bytes
        layers[i] = _layer(packer, layer, keys, keys + cache_bytes, fill)
        layers[i].window, layers[i].group = groups.windows[group], group
        give_back()
    rotary = inner.rotary_emb
    packer.kept.append(layers)
    spec = Spec(
        hidden=settings.hidden_size, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        intermediate=intermediate, layers=len(inner.layers),
        vocabulary=vocabulary, block_size=block_size, partial=int(partial), first_token=first_token,
        epsilon=inner.norm.variance_epsilon, scaling=first.scaling, rotary_scaling=rotary.attention_scaling,
        frequencies=packer.floats(rotary.inv_freq), embedding=embedding, final_norm=final_norm,
        layer=layers, head=head,
    )  # fmt: skip
    return spec, packer.kept


def _release(*parts: nn.Module) -> None:
    """Free what is packed now."""
    for part in parts:
        for parameter in part.parameters():
            parameter.data = parameter.new_empty(0)


def _embedding(packer: Packer, model: Any, form: Form) -> int | None:
    """Where the embedding lies; None where the head's weights are the same."""
    weight = model.model.embed_tokens.weight.detach()
    if form.head == form.dtype and weight.data_ptr() == model.lm_head.weight.data_ptr():
        return None
    # A copy: a view of the checkpoint would keep all of its pages in memory.
    copied = packer.arena.new(weight.shape, DTYPES[form.dtype]).copy_(weight)
    packer.kept.append(copied)
    return copied.data_ptr()


def _layer(packer: Packer, layer: Any, keys: int, values: int, fill: Callable[[nn.Module], None]) -> Layer:
    def packed(*linears: Any) -> Linear:
        for one in linears:
            fill(one)
        made = packer.linears([one.weight for one in linears], [one.bias for one in linears])
        _release(*linears)
        return made

    attention, mlp = layer.self_attn, layer.mlp
    fill(mlp.gate_proj)
    fill(mlp.up_proj)
    gate_up = packer.linear(InTurns(mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()))
    _release(mlp.gate_proj, mlp.up_proj)
    qkv, output = packed(attention.q_proj, attention.k_proj, attention.v_proj), packed(attention.o_proj)
    down = packed(mlp.down_proj)
    fill(layer)  # its norms
    query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return Layer(
        qkv=qkv,
        output=output,
        gate_up=gate_up,
        down=down,
        input_norm=packer.floats(layer.input_layernorm.weight),
        post_norm=packer.floats(layer.post_attention_layernorm.weight),
        query_norm=packer.floats(getattr(query_norm, "weight", None)),
        key_norm=packer.floats(getattr(key_norm, "weight", None)),
        keys=keys,
        values=values,
        rotary=int(getattr(attention, "use_rope", 1)),
    )  # fmt: skip


def lazy_zeros(size: int) -> np.ndarray:
    """Zeros whose pages, large ones if it can, the system supplies on first use; at a multiple of 64."""
    import mmap

    size = -(-max(size, 1) // HUGE_PAGE) * HUGE_PAGE  # others aren't put where large pages begin
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)
