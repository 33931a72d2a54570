"""Rows of logits whose tokens a device chooses, and what the CPU chooses for them."""

import math

import numpy as np
import torch
from torch import Tensor

from engine.kernels.triton import sampling
from engine.kernels.triton.sampling import SamplingWorkspace, choose_tokens, pack_parameters
from engine.messages import Sampling
from engine.worker import sampler
from tests.engine.kernels.triton.numbers import poisoned

Place = torch.device | str
MANY_SLOTS = 50


def table_of(params: list[Sampling], slots: np.ndarray, device: Place = "cpu") -> Tensor:
    """The device's table with the parameters of each row in its slot, and garbage in all others."""
    table = poisoned(MANY_SLOTS, sampling.PARAMETERS, dtype=torch.int32)
    packed = pack_parameters(
        np.array([p.temperature for p in params], dtype=np.float32),
        np.array([p.top_k for p in params]),
        np.array([p.top_p for p in params]),
        np.array([p.min_p for p in params], dtype=np.float32),
        np.array([p.seed for p in params], dtype=np.uint64),
    )
    table[torch.from_numpy(slots)] = torch.from_numpy(packed)
    return table.to(device)


def choose(
    logits: Tensor,
    params: list[Sampling],
    counts: list[int],
    seed: int = 0,
    padding: int = 0,
    filtered: bool = True,
    device: Place = "cpu",
) -> list[int]:
    """Tokens of rows in random slots, with rows of padding between them and unwritten memory around.

    Args:
        logits: on the host.
        device: that chooses.
    """
    rows, vocab = logits.shape
    rng = np.random.default_rng(seed)
    place = np.sort(rng.permutation(rows + padding)[:rows])
    slots = np.full(rows + padding, -1, dtype=np.int32)
    slots[place] = rng.permutation(MANY_SLOTS)[:rows]
    spread = poisoned(rows + padding, vocab + 5, dtype=logits.dtype)
    spread[torch.from_numpy(place), :vocab] = logits
    steps, out = poisoned(rows + padding, dtype=torch.int32), poisoned(rows + padding, dtype=torch.int32)
    steps[torch.from_numpy(place)] = torch.tensor(counts, dtype=torch.int32)
    workspace = SamplingWorkspace.allocate(rows + padding + 1, vocab, device)
    for memory in (workspace.tops, workspace.tokens, workspace.weights, workspace.minimums):
        memory.copy_(poisoned(*memory.shape, dtype=memory.dtype))
    table = table_of(params, slots[place], device)
    spread, steps, out = (one.to(device) for one in (spread, steps, out))
    choose_tokens(spread[:, :vocab], table, torch.from_numpy(slots).to(device), steps, out, workspace, filtered)
    out = out.cpu()
    assert (out[np.setdiff1d(np.arange(rows + padding), place)] == poisoned(1, dtype=torch.int32)).all()
    return out[torch.from_numpy(place)].tolist()


def by_the_cpu(logits: Tensor, params: list[Sampling], counts: list[int]) -> list[int]:
    part = logits.float()
    found = part.numpy().argmax(-1)
    for i, p in enumerate(params):
        if p.temperature > 0 and math.isfinite(part[i, found[i]]):
            number = sampler.uniform(np.array([p.seed], dtype=np.uint64), np.array([counts[i]]))
            found[i] = sampler.draw(part[i : i + 1], [p], number)[0]
    return found.tolist()
