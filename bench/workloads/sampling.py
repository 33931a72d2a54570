"""In which order the rows of a data set are sent, and what keeps one load point from finding another's in a cache.

A data set is smaller than what a search sends, so its rows come again: in a new order on every pass, and with a salt at
the beginning of the prompt that belongs to the seed and the pass. Rows of one pass share it, so that beginnings which
rows of the data set have in common stay common.
"""

import hashlib
from collections.abc import Iterator

import numpy as np

_SALT_TOKENS = 4


def passes(rows: int, seed: int) -> Iterator[tuple[int, str]]:
    """Endless (row, salt): all rows in a seeded order, then again in another."""
    rng = np.random.default_rng(seed)
    number = 0
    while True:
        salt = hashlib.blake2b(f"{seed}|{number}".encode(), digest_size=6).hexdigest()
        for row in rng.permutation(rows).tolist():
            yield row, salt
        number += 1


def salt_text(text: str, salt: str) -> str:
    return f"[{salt}] {text}"


def salt_ids(ids: list[int], salt: str, pool: list[int]) -> list[int]:
    """Some ids from `pool` before the prompt, and as many fewer at its end, so that the length stays."""
    rng = np.random.default_rng(int(salt, 16))
    count = min(_SALT_TOKENS, len(ids))
    return [pool[i] for i in rng.integers(len(pool), size=count).tolist()] + ids[: len(ids) - count]
