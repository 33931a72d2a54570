"""Packs a Llama-like decoder from transformers' modules for the fused stack in C++.

`refusal` gives the reason why a model can't use the fused stack; such models use the generic backend.
"""

from collections.abc import Callable, Sequence
from ctypes import POINTER, c_int32
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.heap import trim_heap
from engine.kernels.cpu.bindings import Layer, Linear, StackSpec
from engine.kernels.cpu.huge_pages import Arena, lazy_zeros
from engine.kernels.cpu.packed_files import PackedFiles
from engine.kernels.cpu.packing import LANES, Concatenated, Interleaved, Weight
from engine.kernels.quantization import GROUPS
from engine.model.families import Family, family_of
from engine.model.kv_groups import KVGroups
from engine.model.model_info import kv_head_bytes
from engine.model.rotary_axes import rotary_axes
from engine.model.stage import Stage


@dataclass(frozen=True, slots=True)
class StackFormats:
    """Formats of a fused stack, by their names in `bindings.FORMATS`."""

    dtype: str  # of the embedding and of everything else that is not quantized
    weights: str  # of the layers' linears
    cache: str  # of keys and values

    @property
    def head(self) -> str:
        """The head stays int8 where the layers are int4: 4 bits are too few for it."""
        return "int8" if self.weights == "int4" else self.weights


MAX_HEAD_DIM, MAX_HIDDEN = 256, 16384  # sizes of buffers in the kernels
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def structural_refusal(model: Any) -> str | None:
    """Why fused stacks, in C++ or Triton, don't compute a decoder of transformers; None if it has their structure."""
    hf_config = model.config
    if not (family_of(hf_config.model_type) or Family()).fused:
        return f"the kernels do not support models of type {hf_config.model_type!r}"
    if getattr(hf_config, "hidden_act", "silu") != "silu":
        return f"its activation is {hf_config.hidden_act}"
    mlp = model.model.layers[0].mlp
    if any(linear.bias is not None for linear in (mlp.gate_proj, mlp.up_proj)):
        return "its MLP has biases"
    if len(model.get_input_embeddings().weight) != len(model.get_output_embeddings().weight):
        return "it embeds tokens that are never sampled"
    return None


def refusal(model: Any, formats: StackFormats, block_size: int) -> str | None:
    """Why a transformers model, or a rank's shard of it, can't use the fused stack in C++; None if it can."""
    structural = structural_refusal(model)
    if structural is not None:
        return structural
    hf_config = model.config
    if formats.dtype not in DTYPES:
        return f"the kernels do not support {formats.dtype}"
    for what, kind in (("weights", formats.weights), ("caches", formats.cache)):
        if kind != formats.dtype != "bfloat16":
            return f"the kernels support {kind} {what} only with --dtype bfloat16"
    if block_size % LANES:
        return f"--block-size {block_size} is not a multiple of {LANES}"
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    width = attention.o_proj.weight.shape[1]
    step = GROUPS.get(formats.weights, LANES)
    sizes = {
        "hidden size": (hf_config.hidden_size, max(step, GROUPS.get(formats.head, LANES))),
        "MLP": (mlp.gate_proj.weight.shape[0], step),
        "attention": (width, step),
    }
    for what, (size, multiple) in sizes.items():
        if size % multiple:
            return f"its {what} of {size} elements is not a multiple of {multiple}"
    if attention.head_dim % LANES:
        return f"its heads of {attention.head_dim} elements are not a multiple of {LANES}"
    if attention.head_dim > MAX_HEAD_DIM or hf_config.hidden_size > MAX_HIDDEN:
        return (
            f"its heads ({attention.head_dim}) or hidden states ({hf_config.hidden_size}) are too large for the kernels"
        )
    return None


@dataclass
class Packer:
    """Builds the structures of the kernels, and owns the arrays that they point to."""

    kind: str  # format of the layers' weights, see engine.kernels.cpu.packing
    files: PackedFiles
    owners: list[Any] = field(default_factory=list)
    arena: Arena = field(default_factory=Arena)

    def linear(self, weight: Weight, bias: Tensor | None = None, kind: str = "") -> Linear:
        """Pack a weight [outputs, inputs]."""
        packed = self.files.pack(weight, kind or self.kind, self.arena.empty)
        scales = None if packed.scales is None else self._at(packed.scales)
        return Linear(self._at(packed.panels), scales, self.floats(bias), *weight.shape)

    def linears(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Linear:
        """Pack several weights of the same inputs as one."""
        bias = None
        if any(one is not None for one in biases):
            each = zip(weights, biases, strict=True)
            bias = torch.cat([w.new_zeros(len(w)) if one is None else one.detach() for w, one in each])
        return self.linear(Concatenated([one.detach() for one in weights]), bias)

    def floats(self, values: Tensor | None) -> int | None:
        return None if values is None else self._at(values.detach().float().contiguous())

    def axes(self, rotary: Any) -> Any:
        """`Spec::axes` of a rotary embedding."""
        axes = rotary_axes(rotary).numpy()
        self.owners.append(axes)
        return axes.ctypes.data_as(POINTER(c_int32))

    def _at(self, values: Tensor) -> int:
        self.owners.append(values)
        return values.data_ptr()


def make_spec(  # noqa: PLR0913  (most are keywords with defaults)
    model: Any,
    formats: StackFormats,
    num_blocks: int,
    block_size: int,
    groups: KVGroups,
    *,
    partial: bool,
    first_token: int = 0,
    fill: Callable[[nn.Module], None] = lambda _: None,
    packed_folder: Path | None = None,
    stage: Stage | None = None,
) -> tuple[StackSpec, list[Any]]:
    """Pack a transformers model, or a rank's shard of it, and allocate its KV cache. The model loses its weights.

    Args:
        groups: the KV groups of the layers.
        partial: whether several ranks share the model.
        first_token: the first token id of the rank's part of the vocabulary.
        fill: loads the weights of a module that has none yet. One linear at a time is in memory twice.
        packed_folder: where packed weights are kept for the next start; None: nowhere.
        stage: the pipeline stage whose layers the model has; None: all.

    Returns the spec, and the arrays that it points to.
    """
    packer, inner = Packer(formats.weights, PackedFiles(packed_folder)), model.model
    ends = _pack_ends(packer, model, formats, fill, stage)
    first = inner.layers[0].self_attn
    head_dim = first.head_dim
    heads, kv_heads = (proj.weight.shape[0] // head_dim for proj in (first.q_proj, first.k_proj))
    intermediate = inner.layers[0].mlp.gate_proj.weight.shape[0]
    cache_bytes = num_blocks * kv_heads * block_size * kv_head_bytes(formats.cache, head_dim)
    layers = (Layer * len(inner.layers))()
    cache = lazy_zeros(2 * groups.group_size * cache_bytes)  # one allocation, so that all its pages can be huge pages
    packer.owners.append(cache)
    for i, layer in enumerate(inner.layers):
        group, index = groups.places[i if stage is None else stage.begin + i]
        keys = cache.ctypes.data + 2 * index * cache_bytes
        layers[i] = _layer(packer, layer, keys, keys + cache_bytes, fill)
        layers[i].window, layers[i].group = groups.windows[group], group
        trim_heap()
    packer.files.close()
    rotary = inner.rotary_emb
    packer.owners.append(layers)
    spec = StackSpec(
        hidden=model.config.hidden_size, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        intermediate=intermediate, layers=len(inner.layers),
        vocabulary=ends.vocabulary, block_size=block_size, partial=int(partial), first_token=first_token,
        embedded=ends.embedded, epsilon=inner.norm.variance_epsilon, scaling=first.scaling,
        rotary_scaling=rotary.attention_scaling, frequencies=packer.floats(rotary.inv_freq), axes=packer.axes(rotary),
        embedding=ends.embedding, final_norm=ends.final_norm, layer=layers, head=ends.head,
    )  # fmt: skip
    return spec, packer.owners


def release(*parts: nn.Module) -> None:
    """Free the weights of modules that are packed."""
    for part in parts:
        for parameter in part.parameters():
            parameter.data = parameter.new_empty(0)


@dataclass(frozen=True, slots=True)
class _Ends:
    """What a stack has before its layers and behind them; see `Spec` in spec.h."""

    embedding: int | None
    embedded: int
    final_norm: int | None
    vocabulary: int
    head: Linear


def _pack_ends(
    packer: Packer, model: Any, formats: StackFormats, fill: Callable[[nn.Module], None], stage: Stage | None
) -> _Ends:
    """Pack embedding, final norm and head, as far as the stage has them.

    A stack without an embedding embeds no token: its hidden states are put in. One without a head runs no last part.
    """
    inner, lm_head = model.model, model.lm_head
    embeds, ends = stage is None or stage.is_first, stage is None or stage.is_last
    chooses = stage is None or stage.has_head
    for part, needed in ((inner.embed_tokens, embeds), (inner.norm, ends), (lm_head, chooses)):
        if needed:
            fill(part)
    embedding = _embedding(packer, model, formats) if embeds else None
    final_norm = packer.floats(inner.norm.weight) if ends else None
    vocabulary, embedded = len(lm_head.weight), len(inner.embed_tokens.weight)
    head = packer.linear(lm_head.weight.detach(), kind=formats.head) if chooses else Linear()
    release(inner.embed_tokens, lm_head)
    return _Ends(embedding, embedded if embeds else 0, final_norm, vocabulary, head)


def _embedding(packer: Packer, model: Any, formats: StackFormats) -> int | None:
    """The address of the embedding; None if it is tied to a head that is not quantized."""
    weight = model.model.embed_tokens.weight.detach()
    head = model.lm_head.weight  # on the meta device in a pipeline stage without a head
    if formats.head == formats.dtype and weight.data_ptr() == head.data_ptr():
        return None
    # A copy: a view of the checkpoint would keep all of its pages in memory.
    copied = packer.arena.empty(weight.shape, DTYPES[formats.dtype]).copy_(weight)
    packer.owners.append(copied)
    return copied.data_ptr()


def _layer(packer: Packer, layer: Any, keys: int, values: int, fill: Callable[[nn.Module], None]) -> Layer:
    def packed(*linears: Any) -> Linear:
        for one in linears:
            fill(one)
        made = packer.linears([one.weight for one in linears], [one.bias for one in linears])
        release(*linears)
        return made

    attention, mlp = layer.self_attn, layer.mlp
    fill(mlp.gate_proj)
    fill(mlp.up_proj)
    gate_up = packer.linear(Interleaved(mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()))
    release(mlp.gate_proj, mlp.up_proj)
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
