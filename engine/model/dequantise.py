"""What weights in few bits stand for (see `engine.model.quantised`), each format as its writers define it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.model.quantised import WORD, Scheme

AWQ_SLOTS = [0, 4, 1, 5, 2, 6, 3, 7]  # of a word, for each of its eight outputs

Parts = Mapping[str, Tensor]


def weight_of(parts: Parts, scheme: Scheme, shape: tuple[int, ...]) -> Tensor:
    """A linear's weight [outputs, inputs] in float32, from its tensors by the ends of their names."""
    return {"awq": _awq, "gptq": _gptq, "packed": _packed, "scaled": _scaled}[scheme.kind](parts, scheme, shape)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Words as numbers, the lowest bits first: [..., n] -> [..., n * 32 / bits]."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _awq(parts: Parts, scheme: Scheme, shape: tuple[int, ...]) -> Tensor:
    """qweight [inputs, outputs / 8], qzeros [groups, outputs / 8], scales [groups, outputs]."""

    def in_order(words: Tensor) -> Tensor:
        return _unpack(words, scheme.bits).unflatten(-1, (-1, 8))[..., AWQ_SLOTS].flatten(-2)

    each = shape[1] // len(parts["scales"])
    zeros, scales = (
        values.repeat_interleave(each, 0) for values in (in_order(parts["qzeros"]), parts["scales"].float())
    )
    return ((in_order(parts["qweight"]) - zeros).float() * scales).T.contiguous()


def _gptq(parts: Parts, scheme: Scheme, shape: tuple[int, ...]) -> Tensor:
    """qweight [inputs * bits / 32, outputs], qzeros [groups, outputs * bits / 32], scales [groups, outputs].

    g_idx [inputs] says which group an input is in, where they were ordered by activations.
    """
    inputs, bits = shape[1], scheme.bits
    zeros = (_unpack(parts["qzeros"], bits) + scheme.less) & ((1 << bits) - 1)
    scales = parts["scales"].float()
    group = parts["g_idx"].long() if "g_idx" in parts else torch.arange(inputs) // (inputs // len(scales))
    whole = _unpack(parts["qweight"].T.contiguous(), bits)
    return (whole - zeros[group].T).float() * scales[group].T


def _packed(parts: Parts, scheme: Scheme, shape: tuple[int, ...]) -> Tensor:
    """weight_packed [outputs, inputs * bits / 32], weight_scale [outputs, groups]; zero points packed along outputs."""
    outputs, inputs = shape
    scales = parts["weight_scale"].float().reshape(outputs, -1)
    each = inputs // scales.shape[1]
    whole = _unpack(parts["weight_packed"], scheme.bits)
    if scheme.symmetric:
        zeros = torch.full_like(scales, 1 << (scheme.bits - 1), dtype=torch.int32)
    else:
        zeros = _unpack(parts["weight_zero_point"].T.contiguous(), scheme.bits).T[:outputs]
    return (whole - zeros.repeat_interleave(each, 1)).float() * scales.repeat_interleave(each, 1)


def _scaled(parts: Parts, scheme: Scheme, shape: tuple[int, ...]) -> Tensor:
    """weight [outputs, inputs] of a byte each; a scale for all, an output, a group of its inputs, or a block."""
    weight = parts["weight"].float()
    scales = parts.get("weight_scale", parts.get("weight_scale_inv"))
    assert scales is not None
    if not scheme.symmetric:
        weight = weight - _spread(parts["weight_zero_point"], scheme, shape)
    return weight * _spread(scales, scheme, shape)


def _spread(values: Tensor, scheme: Scheme, shape: tuple[int, ...]) -> Tensor:
    """Values of blocks, of which the last may be shorter, for each number of a weight."""
    values = values.float()
    if values.ndim < 2:
        values = values.reshape(-1, 1)
    for dim, length in enumerate(shape):
        count = values.shape[dim]
        if count not in (1, length):
            each = scheme.block[dim] if scheme.block else length // count
            values = values.repeat_interleave(each, dim).narrow(dim, 0, length)
    return values
