"""Cuts a loaded model down to one rank's share, and adds the sums and gathers that make the shares one model."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.errors import ModelError
from engine.model.split import DIVIDED_INPUT, DIVIDED_OUTPUT, EXPERTS, PACKED, WHOLE, Split

# What attention classes call their own counts of heads, where they don't infer them from shapes.
HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads")


class Group(Protocol):
    """The ranks that run a model together; all of them make the same calls in the same order."""

    rank: int
    size: int

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, the same bits on each; may use up its argument."""
        ...

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors laid end to end along the last dimension."""
        ...


def shard(model: Any, split: Split, group: Group) -> None:
    """Cut the model in place to the share of `group.rank`; the embedding and the head stay whole on every rank.

    Raises ModelError if a part of the model isn't built as its plan supposes.
    """
    for path, module in list(model.base_model.named_modules()):
        style = split.style(path)
        if style is None or style in WHOLE:
            continue
        if style == EXPERTS:
            _shard_experts(path, module, split, group)
        elif isinstance(module, nn.Linear):
            _shard_linear(module, style, group)
        else:
            raise ModelError(f"{path} can't be divided among ranks: it is a {type(module).__name__}")
    if split.divides_heads:
        _divide_head_counts(model, split.size)


def _shard_linear(linear: nn.Linear, style: str, group: Group) -> None:
    if style in DIVIDED_OUTPUT:
        linear.weight = _part(linear.weight, 0, group)
        if linear.bias is not None:
            linear.bias = _part(linear.bias, 0, group)
        linear.out_features //= group.size
        if style == "colwise_gather_output":
            linear.register_forward_hook(lambda _module, _inputs, output: group.all_gather(output))
    else:
        assert style in DIVIDED_INPUT, style
        linear.weight = _part(linear.weight, 1, group)
        if group.rank != 0:  # a sum has it once
            linear.register_parameter("bias", None)
        linear.in_features //= group.size
        linear.register_forward_hook(lambda _module, _inputs, output: group.all_reduce(output))
        if style == "rowwise_split_input":
            linear.register_forward_pre_hook(lambda _module, inputs: (_slice(inputs[0], -1, group), *inputs[1:]))


def _shard_experts(path: str, experts: nn.Module, split: Split, group: Group) -> None:
    """Every rank has a slice of each expert, whose outputs are summed once for all experts."""
    for name, parameter in list(experts.named_parameters(recurse=False)):
        style = split.style(f"{path}.{name}")
        if style == PACKED:  # [experts, gate and up, hidden]
            halves = [_slice(half, -2, group) for half in parameter.chunk(2, dim=-2)]
            setattr(experts, name, _frozen(torch.cat(halves, dim=-2)))
        elif style == "rowwise":  # [experts, hidden, inner]
            setattr(experts, name, _part(parameter, -1, group))
        else:
            raise ModelError(f"{path}.{name} can't be divided among ranks: its plan doesn't say how")
    experts.register_forward_hook(lambda _module, _inputs, output: group.all_reduce(output))


def _divide_head_counts(model: nn.Module, size: int) -> None:
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            for name in HEAD_COUNTS:
                count = getattr(module, name, None)
                if isinstance(count, int):
                    setattr(module, name, count // size)


def _slice(tensor: Tensor, dimension: int, group: Group) -> Tensor:
    length, odd = divmod(tensor.shape[dimension], group.size)
    if odd:
        raise ModelError(f"a tensor of shape {tuple(tensor.shape)} can't be divided among {group.size} ranks")
    return tensor.narrow(dimension, group.rank * length, length)


def _part(tensor: Tensor, dimension: int, group: Group) -> nn.Parameter:
    """A copy of the rank's slice, so that the whole can be freed."""
    return _frozen(_slice(tensor, dimension, group).clone(memory_format=torch.contiguous_format))


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
