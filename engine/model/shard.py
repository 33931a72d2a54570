"""Cuts a model that has no numbers yet to one rank's share, and adds the sums and gathers that make the shares one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import ModelError
from engine.model.blank import Blank, Cut
from engine.model.group import Group
from engine.model.split import (
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
    Split,
)
from engine.model.vocabulary import Slice, divide_embedding

# What attention classes call their own counts of heads, or the width of all, where they don't infer them from shapes.
HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "split_size")


def shard(blank: Blank, split: Split, group: Group) -> None:
    """Cut the model in place to the share of `group.rank`, its vocabulary included.

    Raises ModelError if a part of the model isn't built as its plan supposes.
    """
    model = blank.model
    for path, module in list(model.base_model.named_modules()):
        style = split.style(path)
        if style == EXPERTS:
            module.register_forward_hook(lambda _module, _inputs, output: group.all_reduce(output))
        elif style == NORM:
            _shard_norm(blank, path, group)
        elif style is not None and style not in WHOLE:
            _shard_linear(blank, path, style, split, group)
        for name, _ in list(module.named_parameters(recurse=False)):
            style = split.style(f"{path}.{name}")
            if style is not None:
                _shard_parameter(blank, module, name, style, group)
    if split.divides_heads:
        _divide_head_counts(model, split)
    _divide_vocabulary(blank, split, group)


def _shard_linear(blank: Blank, path: str, style: str, split: Split, group: Group) -> None:
    linear = blank.model.base_model.get_submodule(path)
    weight, bias = getattr(linear, "weight", None), getattr(linear, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ModelError(f"{path} can't be divided among ranks: it is a {type(linear).__name__}")
    outputs, inputs = (1, 0) if split.family.transposed else (0, 1)
    if style in DIVIDED_OUTPUT:
        ranges = shares_of(style, weight.shape[outputs], split, group.rank)
        blank.cut(linear, "weight", Cut(outputs, ranges))
        if bias is not None:
            blank.cut(linear, "bias", Cut(0, ranges))
        _divide_count(linear, ("out_features", "nf"), group)
        if style == "colwise_gather_output":
            linear.register_forward_hook(lambda _module, _inputs, output: group.all_gather(output))
    else:
        assert style in DIVIDED_INPUT, style
        blank.cut(linear, "weight", _share(weight, inputs, group))
        if bias is not None and group.rank != 0:  # a sum has it once
            if split.family.transposed:  # its class adds one in any case
                blank.cut(linear, "bias", Cut(0, ()))
            else:
                linear.register_parameter("bias", None)
        _divide_count(linear, ("in_features", "nx"), group)
        linear.register_forward_hook(lambda _module, _inputs, output: group.all_reduce(output))
        if style == "rowwise_split_input":
            linear.register_forward_pre_hook(lambda _module, inputs: (_slice(inputs[0], group), *inputs[1:]))


def _shard_norm(blank: Blank, path: str, group: Group) -> None:
    norm: Any = blank.model.base_model.get_submodule(path)
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or epsilon is None:
        raise ModelError(f"{path} can't be divided among ranks: it is a {type(norm).__name__}")
    length = len(weight)
    blank.cut(norm, "weight", _share(weight, 0, group))

    def forward(x: Tensor) -> Tensor:
        wide = x.float()
        squares = group.all_reduce(wide.pow(2).sum(-1, keepdim=True))
        return (norm.weight * (wide * torch.rsqrt(squares / length + epsilon))).to(x.dtype)

    norm.forward = forward


def shares_of(style: str, length: int, split: Split, rank: int) -> tuple[tuple[int, int], ...]:
    """What a rank has of a linear's divided output: ranges (begin, length)."""
    return _shares(_parts(style, length, split), split.size, rank)


def _parts(style: str, length: int, split: Split) -> tuple[int, ...]:
    """Lengths of what lies side by side in a linear's output."""
    if style == GATE_UP:
        return length // 2, length // 2
    if style == QKV:
        heads, kv_heads = split.rank.num_heads, split.rank.num_kv_heads
        each = length // (heads + 2 * kv_heads)
        return heads * each, kv_heads * each, kv_heads * each
    return (length,)


def _shard_parameter(blank: Blank, module: nn.Module, name: str, style: str, group: Group) -> None:
    parameter = getattr(module, name)
    if style == PACKED:  # [experts, gate and up, hidden]
        half = parameter.shape[-2] // 2
        blank.cut(module, name, _share(parameter, parameter.ndim - 2, group, (half, half)))
    elif style == FIRST_RANK:
        if group.rank != 0:
            blank.cut(module, name, Cut(0, ()))
    else:  # experts that are divided by rows: [experts, hidden, inner]
        blank.cut(module, name, _share(parameter, CUTS.get(style, -1) % parameter.ndim, group))


def _divide_vocabulary(blank: Blank, split: Split, group: Group) -> None:
    embedding, head = blank.model.get_input_embeddings(), blank.model.get_output_embeddings()
    vocabulary = Slice(split.rank.vocab_size, group)
    first, count = vocabulary.first, vocabulary.count
    for module in {embedding, head}:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if len(parameter) == vocabulary.total:  # what is shared is cut once
                blank.cut(module, name, Cut(0, ((first, count),)))
    embedding.num_embeddings = head.out_features = count
    blank.vocabulary = vocabulary
    divide_embedding(embedding, vocabulary)


def _divide_count(linear: nn.Module, names: tuple[str, ...], group: Group) -> None:
    for name in names:
        if hasattr(linear, name):
            setattr(linear, name, getattr(linear, name) // group.size)


def _divide_head_counts(model: Any, split: Split) -> None:
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            for name in HEAD_COUNTS:
                count = getattr(module, name, None)
                if isinstance(count, int):
                    setattr(module, name, count // split.size)
    if split.family.heads_in_config:
        model.config.num_attention_heads //= split.size


def _share(parameter: Tensor, dim: int, group: Group, parts: Sequence[int] = ()) -> Cut:
    """The rank's share of each of the parts that lie side by side along a dimension; none: it is one part."""
    return Cut(dim, _shares(parts or (parameter.shape[dim],), group.size, group.rank))


def _shares(parts: Sequence[int], size: int, rank: int) -> tuple[tuple[int, int], ...]:
    ranges, begin = [], 0
    for length in parts:
        share, odd = divmod(length, size)
        if odd:
            raise ModelError(f"a length of {length} can't be divided among {size} ranks")
        ranges.append((begin + rank * share, share))
        begin += length
    return tuple(ranges)


def _slice(tensor: Tensor, group: Group) -> Tensor:
    length = tensor.shape[-1] // group.size
    return tensor.narrow(-1, group.rank * length, length)
