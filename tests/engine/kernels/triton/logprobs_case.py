"""Random logits whose logprobs a device computes, checked against log_softmax in float64."""

import numpy as np
import torch
from torch import Tensor

from engine.kernels.triton.logprobs import LogprobsWorkspace, token_logprobs
from tests.engine.kernels.triton.numbers import poisoned, random_numbers

Out = tuple[Tensor, Tensor, Tensor]


def compute(logits: Tensor, rows: np.ndarray, tokens: Tensor, top: int) -> Out:
    n, device = len(rows), logits.device
    out = (
        poisoned(n, 1 + top, dtype=torch.int32, device=device),
        poisoned(n, 1 + top, device=device),
        poisoned(n, dtype=torch.int32, device=device),
    )
    workspace = LogprobsWorkspace.allocate(n + 1, logits.shape[1], device)
    for memory in (workspace.tops, workspace.firsts, workspace.sums, workspace.greater):
        memory.copy_(poisoned(*memory.shape, dtype=memory.dtype))
    token_logprobs(logits, torch.from_numpy(rows).to(device), tokens, out, workspace)
    return out


def check_logprobs(
    count: int, vocab: int, top: int, levels: int, dtype: torch.dtype, seed: int, device: torch.device | str = "cpu"
) -> Out:
    """`levels`: how many different logits there are; few make ties, of which the lower ids come first."""
    rng = np.random.default_rng(seed)
    memory = poisoned(count, vocab + 3, dtype=dtype)
    memory[:, :vocab] = ((random_numbers(count, vocab, seed=seed) * levels / 4).round() * 12 / levels).to(dtype)
    logits = memory.to(device)[:, :vocab]
    rows = np.where(rng.random(count) < 0.3, -1, rng.integers(0, count, count)).astype(np.int32)
    tokens = torch.from_numpy(rng.integers(0, vocab, count).astype(np.int32))
    out = compute(logits, rows, tokens.to(device), top)
    ids, values, ranks = (one.cpu() for one in out)
    logits = logits.cpu()
    for i, row in enumerate(rows.tolist()):
        if row < 0:
            assert (ids[i] == poisoned(1, dtype=torch.int32)).all(), "padding isn't written"
            continue
        token = int(tokens[row])
        expected = torch.log_softmax(logits[row].double(), -1)
        order = torch.sort(logits[row].float(), descending=True, stable=True).indices[:top]
        assert ids[i].tolist() == [token, *order.tolist()]
        torch.testing.assert_close(values[i].double(), expected[ids[i].long()], rtol=2e-6, atol=2e-6)
        assert int(ranks[i]) == int((logits[row] > logits[row, token]).sum()) + 1
    return out
