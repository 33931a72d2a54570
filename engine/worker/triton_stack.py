"""Lays out a Llama-like decoder from transformers' modules as plain tensors on a device, for the stack in Triton.

`refusal` gives the reason why a model can't use it; such models use the generic device backend.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.heap import trim_heap
from engine.kernels.triton.rotary import Rotary
from engine.model.kv_groups import KVGroups
from engine.model.rotary_axes import rotary_axes, sections
from engine.worker.fused_stack import release, structural_refusal
from engine.worker.linear_products import PLAIN, LinearFormats, Product, ProductFormat

Place = Callable[[Tensor], Tensor]  # copies a tensor of the host to the device
Fill = Callable[[nn.Module], None]  # loads the weights of a module that has none yet, on the device


@dataclass(frozen=True, slots=True)
class StackLinear:
    """Linears of the same inputs, computed as one. outputs: how many each linear has, by its name in the layer."""

    product: Product
    outputs: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class StackLayer:
    """One decoder layer.

    norms: of each query and each key, [head dim]. window: tokens that a query sees, None for all. rotary: None for
    layers without rotation.
    """

    qkv: StackLinear
    output: StackLinear
    gate_up: StackLinear
    down: StackLinear
    input_norm: Tensor
    post_norm: Tensor
    norms: tuple[Tensor, Tensor] | None
    window: int | None
    rotary: Rotary | None
    scaling: float

    @property
    def linears(self) -> tuple[StackLinear, ...]:
        return self.qkv, self.output, self.gate_up, self.down


@dataclass(frozen=True, slots=True)
class TritonStack:
    """A decoder, or a rank's shard of it, on the device.

    embedding: [vocabulary of the rank, hidden]. Tied, the head has the same tensor, if it is not quantized.
    """

    layers: tuple[StackLayer, ...]
    embedding: Tensor
    head: Product
    final_norm: Tensor
    epsilon: float


def refusal(model: Any) -> str | None:
    """Why a transformers model, or a rank's shard of it, can't use the stack in Triton; None if it can."""
    structural = structural_refusal(model)
    if structural is not None:
        return structural
    decoder = model.model
    head_dim = decoder.layers[0].self_attn.head_dim
    if head_dim % 2:
        return f"its heads have {head_dim} elements, an odd number"
    if sections(rotary_axes(decoder.rotary_emb)) is None:
        return "the kernels do not support the way in which it arranges the axes of its rotary positions (M-RoPE)"
    return None


def make_stack(
    model: Any, groups: KVGroups, positions: int, place: Place, fill: Fill, formats: LinearFormats = PLAIN
) -> TritonStack:
    """Load the weights of a transformers model on the device, as a stack. The model loses them.

    Args:
        groups: the KV groups of the layers.
        positions: that tokens may have.
        place: for tables that are computed on the host.
        fill: the linears that are computed as one are on the device twice for a moment.
    """
    inner = model.model
    for part in (inner.embed_tokens, inner.norm, model.lm_head):
        fill(part)
    weights = inner.embed_tokens.weight.detach(), model.lm_head.weight.detach()
    embedding, head = weights[0], weights[0] if weights[0].data_ptr() == weights[1].data_ptr() else weights[1]
    head_product = formats.head.make(head, None)
    del weights, head
    release(inner.embed_tokens, model.lm_head)
    rotary = _rotary(inner.rotary_emb, positions, place)
    layers = []
    for i, layer in enumerate(inner.layers):
        window = groups.windows[groups.places[i][0]] or None
        layers.append(_layer(layer, window, rotary, fill, formats.layers))
        trim_heap()
    norm = inner.norm.weight.detach()
    return TritonStack(tuple(layers), embedding, head_product, norm, inner.norm.variance_epsilon)


def _rotary(module: Any, positions: int, place: Place) -> Rotary:
    """Tables for all positions, with the scaling of the class's attention (YaRN)."""
    angles = torch.arange(positions).float()[:, None] * module.inv_freq.float()
    scaling, axes = module.attention_scaling, rotary_axes(module)
    tables = place(angles.cos() * scaling), place(angles.sin() * scaling)
    arranged = sections(axes)
    if arranged is None or not axes.any():
        return Rotary(*tables)
    return Rotary(*tables, sections=arranged[0], interleaved_sections=arranged[1])


def _layer(layer: Any, window: int | None, rotary: Rotary, fill: Fill, form: ProductFormat) -> StackLayer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = _linear(attention, ("q_proj", "k_proj", "v_proj"), fill, form)
    output = _linear(attention, ("o_proj",), fill, form)
    gate_up = _linear(mlp, ("gate_proj", "up_proj"), fill, form)
    down = _linear(mlp, ("down_proj",), fill, form)
    fill(layer)  # its norms
    norms = None
    if getattr(attention, "q_norm", None) is not None:
        norms = attention.q_norm.weight.detach(), attention.k_norm.weight.detach()
    return StackLayer(
        qkv=qkv,
        output=output,
        gate_up=gate_up,
        down=down,
        input_norm=layer.input_layernorm.weight.detach(),
        post_norm=layer.post_attention_layernorm.weight.detach(),
        norms=norms,
        window=window,
        rotary=rotary if getattr(attention, "use_rope", True) else None,
        scaling=attention.scaling,
    )


def _linear(parent: nn.Module, names: Sequence[str], fill: Fill, form: ProductFormat) -> StackLinear:
    """Put linears of the same inputs side by side, and free the modules' own weights."""
    linears: list[Any] = [getattr(parent, name) for name in names]
    for linear in linears:
        fill(linear)
    outputs = {name: len(linear.weight) for name, linear in zip(names, linears, strict=True)}
    weight, bias = linears[0].weight.detach(), None
    if len(linears) > 1:
        weight = torch.cat([linear.weight.detach() for linear in linears])
    if any(linear.bias is not None for linear in linears):
        biases = [weight.new_zeros(len(one.weight)) if one.bias is None else one.bias.detach() for one in linears]
        bias = torch.cat(biases)
    release(*linears)
    return StackLinear(form.make(weight, bias), outputs)
