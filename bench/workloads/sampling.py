"""The order in which rows of a data set are sent, and salts that keep load points from hitting each other's cache.

A search sends more requests than a data set has rows, so rows are repeated: in a new order on every pass, and with a
salt at the beginning of the prompt that depends on the seed and the pass. Rows of one pass have the same salt, so that
prefixes that rows of the data set share are still shared.
"""

import hashlib
from collections.abc import Iterator

import numpy as np

_SALT_TOKENS = 4


def passes(rows: int, seed: int) -> Iterator[tuple[int, str]]:
    """Endless (row, salt) pairs: all rows in a seeded order, then again in another order with another salt."""
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
    """The prompt with some ids from `pool` before it, and as many removed at its end: its length does not change."""
    rng = np.random.default_rng(int(salt, 16))
    count = min(_SALT_TOKENS, len(ids))
    return [pool[i] for i in rng.integers(len(pool), size=count).tolist()] + ids[: len(ids) - count]
