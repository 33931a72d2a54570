"""Computes the weight of a quantized linear from its stored tensors, as each format defines it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.model.checkpoints.quantized import WORD, QuantScheme

AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # position in its word of each of eight consecutive outputs

Parts = Mapping[str, Tensor]


def dequantize(parts: Parts, scheme: QuantScheme, shape: tuple[int, ...]) -> Tensor:
    """A linear's weight [outputs, inputs] in float32; `parts` are its tensors, keyed by the suffix of their names."""
    return {"awq": _awq, "gptq": _gptq, "packed": _packed, "scaled": _scaled}[scheme.layout](parts, scheme, shape)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Split words into values, the lowest bits first: [..., n] -> [..., n * 32 / bits]."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _awq(parts: Parts, scheme: QuantScheme, shape: tuple[int, ...]) -> Tensor:
    """qweight [inputs, outputs / 8], qzeros [groups, outputs / 8], scales [groups, outputs]."""

    def in_order(words: Tensor) -> Tensor:
        return _unpack(words, scheme.bits).unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2)

    group_size = shape[1] // len(parts["scales"])
    zeros, scales = (
        values.repeat_interleave(group_size, 0) for values in (in_order(parts["qzeros"]), parts["scales"].float())
    )
    return ((in_order(parts["qweight"]) - zeros).float() * scales).T.contiguous()


def _gptq(parts: Parts, scheme: QuantScheme, shape: tuple[int, ...]) -> Tensor:
    """qweight [inputs * bits / 32, outputs], qzeros [groups, outputs * bits / 32], scales [groups, outputs].

    g_idx [inputs], if stored, has the group of each input (activation order).
    """
    inputs, bits = shape[1], scheme.bits
    zeros = (_unpack(parts["qzeros"], bits) + scheme.zero_point_offset) & ((1 << bits) - 1)
    scales = parts["scales"].float()
    group = parts["g_idx"].long() if "g_idx" in parts else torch.arange(inputs) // (inputs // len(scales))
    values = _unpack(parts["qweight"].T.contiguous(), bits)
    return (values - zeros[group].T).float() * scales[group].T


def _packed(parts: Parts, scheme: QuantScheme, shape: tuple[int, ...]) -> Tensor:
    """weight_packed [outputs, inputs * bits / 32], weight_scale [outputs, groups]; zero points packed along outputs."""
    outputs, inputs = shape
    scales = parts["weight_scale"].float().reshape(outputs, -1)
    group_size = inputs // scales.shape[1]
    values = _unpack(parts["weight_packed"], scheme.bits)
    if scheme.symmetric:
        zeros = torch.full_like(scales, 1 << (scheme.bits - 1), dtype=torch.int32)
    else:
        zeros = _unpack(parts["weight_zero_point"].T.contiguous(), scheme.bits).T[:outputs]
    return (values - zeros.repeat_interleave(group_size, 1)).float() * scales.repeat_interleave(group_size, 1)


def _scaled(parts: Parts, scheme: QuantScheme, shape: tuple[int, ...]) -> Tensor:
    """weight [outputs, inputs], one byte each; one scale per tensor, output, group of inputs, or block."""
    weight = parts["weight"].float()
    scales = parts.get("weight_scale", parts.get("weight_scale_inv"))
    assert scales is not None
    if not scheme.symmetric:
        weight = weight - _expand(parts["weight_zero_point"], scheme, shape)
    return weight * _expand(scales, scheme, shape)


def _expand(values: Tensor, scheme: QuantScheme, shape: tuple[int, ...]) -> Tensor:
    """Repeat one value per block for all elements of a weight of this shape. The last block may be smaller."""
    values = values.float()
    if values.ndim < 2:
        values = values.reshape(-1, 1)
    for dim, length in enumerate(shape):
        count = values.shape[dim]
        if count not in (1, length):
            size = scheme.block_shape[dim] if scheme.block_shape else length // count
            values = values.repeat_interleave(size, dim).narrow(dim, 0, length)
    return values
