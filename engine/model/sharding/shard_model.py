"""Reduces a model on the meta device to one rank's shard, and adds the reductions and gathers between ranks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import ModelError
from engine.model.loading.meta_model import MetaModel, ShardSlice
from engine.model.runtime.rank_group import RankGroup
from engine.model.runtime.vocab_shard import VocabShard, shard_embedding
from engine.model.sharding.tp_plan import (
    CUTS,
    DIVIDED_INPUT,
    DIVIDED_OUTPUT,
    EXPERTS,
    FIRST_RANK,
    GATE_UP,
    NORM,
    PACKED,
    QKV,
    WHOLE,
    TPPlan,
)

# Attributes of attention classes that do not infer the number of heads, or the width of all heads, from shapes.
HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "split_size")


def shard_model(meta_model: MetaModel, tp_plan: TPPlan, group: RankGroup) -> None:
    """Reduce the model in place to the shard of `group.rank`, its vocabulary included.

    Raises ModelError if a part of the model is not built as its plan requires.
    """
    model = meta_model.decoder
    for path, module in list(model.base_model.named_modules()):
        style = tp_plan.style(path)
        if style == EXPERTS:
            module.register_forward_hook(lambda _module, _inputs, output: group.all_reduce(output))
        elif style == NORM:
            _shard_norm(meta_model, path, group)
        elif style is not None and style not in WHOLE:
            _shard_linear(meta_model, path, style, tp_plan, group)
        for name, _ in list(module.named_parameters(recurse=False)):
            style = tp_plan.style(f"{path}.{name}")
            if style is not None:
                _shard_parameter(meta_model, module, name, style, group)
    if tp_plan.divides_heads:
        _divide_head_counts(model, tp_plan)
    _shard_vocabulary(meta_model, tp_plan, group)


def _shard_linear(meta_model: MetaModel, path: str, style: str, tp_plan: TPPlan, group: RankGroup) -> None:
    linear = meta_model.decoder.base_model.get_submodule(path)
    weight, bias = getattr(linear, "weight", None), getattr(linear, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ModelError(f"{path} can't be divided among ranks: it is a {type(linear).__name__}")
    outputs, inputs = (1, 0) if tp_plan.family.transposed else (0, 1)
    if style in DIVIDED_OUTPUT:
        ranges = output_ranges(style, weight.shape[outputs], tp_plan, group.rank)
        meta_model.cut(linear, "weight", ShardSlice(outputs, ranges))
        if bias is not None:
            meta_model.cut(linear, "bias", ShardSlice(0, ranges))
        _divide_attribute(linear, ("out_features", "nf"), group)
        if style == "colwise_gather_output":
            linear.register_forward_hook(lambda _module, _inputs, output: group.all_gather(output))
    else:
        assert style in DIVIDED_INPUT, style
        meta_model.cut(linear, "weight", _slice_of(weight, inputs, group))
        if bias is not None and group.rank != 0:  # one rank adds the bias to the sum
            if tp_plan.family.transposed:  # this class can't be without a bias
                meta_model.cut(linear, "bias", ShardSlice(0, ()))
            else:
                linear.register_parameter("bias", None)
        _divide_attribute(linear, ("in_features", "nx"), group)
        linear.register_forward_hook(lambda _module, _inputs, output: group.all_reduce(output))
        if style == "rowwise_split_input":
            linear.register_forward_pre_hook(lambda _module, inputs: (_local_part(inputs[0], group), *inputs[1:]))


def _shard_norm(meta_model: MetaModel, path: str, group: RankGroup) -> None:
    norm: Any = meta_model.decoder.base_model.get_submodule(path)
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or epsilon is None:
        raise ModelError(f"{path} can't be divided among ranks: it is a {type(norm).__name__}")
    length = len(weight)
    meta_model.cut(norm, "weight", _slice_of(weight, 0, group))

    def forward(x: Tensor) -> Tensor:
        wide = x.float()
        squares = group.all_reduce(wide.pow(2).sum(-1, keepdim=True))
        return (norm.weight * (wide * torch.rsqrt(squares / length + epsilon))).to(x.dtype)

    norm.forward = forward


def output_ranges(style: str, length: int, tp_plan: TPPlan, rank: int) -> tuple[tuple[int, int], ...]:
    """A rank's part of a linear's divided output of this length, as ranges (begin, length)."""
    return _ranges(_parts(style, length, tp_plan), tp_plan.size, rank)


def _parts(style: str, length: int, tp_plan: TPPlan) -> tuple[int, ...]:
    """Lengths of the parts that a linear's output consists of."""
    if style == GATE_UP:
        return length // 2, length // 2
    if style == QKV:
        heads, kv_heads = tp_plan.rank_info.num_heads, tp_plan.rank_info.num_kv_heads
        each = length // (heads + 2 * kv_heads)
        return heads * each, kv_heads * each, kv_heads * each
    return (length,)


def _shard_parameter(meta_model: MetaModel, module: nn.Module, name: str, style: str, group: RankGroup) -> None:
    parameter = getattr(module, name)
    if style == PACKED:  # [experts, gate and up, hidden]
        half = parameter.shape[-2] // 2
        meta_model.cut(module, name, _slice_of(parameter, parameter.ndim - 2, group, (half, half)))
    elif style == FIRST_RANK:
        if group.rank != 0:
            meta_model.cut(module, name, ShardSlice(0, ()))
    else:  # experts that are divided by rows: [experts, hidden, inner]
        meta_model.cut(module, name, _slice_of(parameter, CUTS.get(style, -1) % parameter.ndim, group))


def _shard_vocabulary(meta_model: MetaModel, tp_plan: TPPlan, group: RankGroup) -> None:
    embedding, head = meta_model.decoder.get_input_embeddings(), meta_model.decoder.get_output_embeddings()
    shard = VocabShard(tp_plan.rank_info.vocab_size, group)
    # Some models have embeddings of tokens that are never sampled.
    embedded = VocabShard(embedding.num_embeddings, group)
    for module, own in ((embedding, embedded), (head, shard)):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if len(parameter) == own.total:  # a tied parameter has its shard already
                meta_model.cut(module, name, ShardSlice(0, ((own.first, own.count),)))
    embedding.num_embeddings, head.out_features = embedded.count, shard.count
    meta_model.vocab_shard = shard
    shard_embedding(embedding, embedded)


def _divide_attribute(linear: nn.Module, names: tuple[str, ...], group: RankGroup) -> None:
    for name in names:
        if hasattr(linear, name):
            setattr(linear, name, getattr(linear, name) // group.size)


def _divide_head_counts(model: Any, tp_plan: TPPlan) -> None:
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            for name in HEAD_COUNTS:
                count = getattr(module, name, None)
                if isinstance(count, int):
                    setattr(module, name, count // tp_plan.size)
    if tp_plan.family.heads_in_config:
        model.config.num_attention_heads //= tp_plan.size


def _slice_of(parameter: Tensor, dim: int, group: RankGroup, parts: Sequence[int] = ()) -> ShardSlice:
    """The rank's slice of a parameter along a dimension.

    `parts` are the lengths of parts that are divided one by one; by default the whole dimension is one part.
    """
    return ShardSlice(dim, _ranges(parts or (parameter.shape[dim],), group.size, group.rank))


def _ranges(parts: Sequence[int], size: int, rank: int) -> tuple[tuple[int, int], ...]:
    """A rank's range (begin, length) within each part. With parts 8 and 4, rank 1 of 2 has (4, 4) and (10, 2)."""
    ranges, begin = [], 0
    for length in parts:
        each, rest = divmod(length, size)
        if rest:
            raise ModelError(f"a length of {length} can't be divided among {size} ranks")
        ranges.append((begin + rank * each, each))
        begin += length
    return tuple(ranges)


def _local_part(tensor: Tensor, group: RankGroup) -> Tensor:
    length = tensor.shape[-1] // group.size
    return tensor.narrow(-1, group.rank * length, length)
