"""Guesses what a row says next from what it has said: n-gram lookup.

The step that computes a row's newest token computes the guesses after it too, which costs little while a step is bound
by reading the weights; those that turn out to be what the model says are kept. What comes out is the same.
"""

import numpy as np

from engine.messages import Int32s

LONGEST, SHORTEST = 4, 2  # tokens at the end that must have stood before
WORTH = 16  # tokens that a step computes for about the price of one


def propose(tokens: Int32s, most: int) -> Int32s:
    """What followed the last time that the final tokens stood together, at most `most`; the longest match counts."""
    for length in range(min(LONGEST, len(tokens) - 1), SHORTEST - 1, -1):
        tail = tokens[-length:]
        last = len(tokens) - length  # where the tail itself begins
        found = tokens[:last] == tail[0]
        for offset in range(1, length):
            found &= tokens[offset : last + offset] == tail[offset]
        places = np.flatnonzero(found)
        if len(places):
            begin = int(places[-1]) + length
            return tokens[begin : begin + most]
    return tokens[:0]


def share(most: int, decoding: int) -> int:
    """How many guesses each of so many decoding rows may have."""
    return min(most, max(0, WORTH // max(decoding, 1) - 1))
