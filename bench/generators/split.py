"""Divides the requests of a load among generators."""

import numpy as np


def divide(count: int, parts: int, seed: int) -> list[list[int]]:
    """The indices of each part's requests, in ascending order; together they are all indices from 0 to `count` - 1.

    Of each `parts` consecutive requests every part gets one, in an order that is drawn from the seed. All parts thus
    send at the same mean rate at any time, and none gets only the long requests of a workload that alternates.
    """
    rng = np.random.default_rng([seed & 0xFFFF_FFFF, parts])
    rounds = -(-count // parts)
    owners = rng.permuted(np.tile(np.arange(parts), (rounds, 1)), axis=1).ravel()[:count]
    return [np.flatnonzero(owners == part).tolist() for part in range(parts)]
