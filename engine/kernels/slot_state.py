"""Torch implementations of the kernels over the device-resident state of slots, for devices without Triton.

Indices are not negative: without captured steps nothing is padded. See `engine.kernels.triton.slot_state`.
"""

import torch
from torch import Tensor


def gather_ids(ids: Tensor, last_token: Tensor, slot_of: Tensor) -> None:
    """Replace each negative id by the newest token of its slot, in place.

    Args:
        ids: int32[tokens]; negative: sampled by a step whose tokens the host does not have yet.
        last_token: int32[slots].
        slot_of: int32[tokens].
    """
    ids.copy_(torch.where(ids < 0, last_token[slot_of.long()], ids))


def append_tokens(last_token: Tensor, slots: Tensor, tokens: Tensor) -> None:
    """Make each of `tokens` int32[n] the newest token of its slot; `slots` int32[n] are distinct."""
    last_token.index_copy_(0, slots.long(), tokens)


def write_elements(table: Tensor, rows: Tensor, columns: Tensor, values: Tensor) -> None:
    """Write table[rows[i], columns[i]] = values[i]; int32[n] each, distinct places of a table [rows, width]."""
    table.view(-1).index_copy_(0, rows.long() * table.shape[1] + columns, values)
