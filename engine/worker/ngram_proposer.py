"""Speculative decoding by n-gram lookup: proposes draft tokens from a request's own tokens.

The step that computes a request's newest token also computes its draft tokens, which costs little while a step is bound
by reading the weights. Draft tokens that equal the model's choice are accepted, so the output does not change.
"""

import numpy as np

from engine.arrays import Int32s

LONGEST, SHORTEST = 4, 2  # lengths of n-grams, tried from the longest
CHEAP_TOKENS = 16  # tokens that a step computes in about the time of one


def propose(tokens: Int32s, most: int) -> Int32s:
    """At most `most` tokens that followed the latest earlier occurrence of the final n-gram; empty without one.

    E.g. tokens 5 6 7 8 5 6, most 3: the final n-gram 5 6 occurred at the beginning, so the drafts are 7 8 5.
    """
    for length in range(min(LONGEST, len(tokens) - 1), SHORTEST - 1, -1):
        tail = tokens[-length:]
        last = len(tokens) - length  # where the final n-gram begins
        found = tokens[:last] == tail[0]
        for offset in range(1, length):
            found &= tokens[offset : last + offset] == tail[offset]
        places = np.flatnonzero(found)
        if len(places):
            begin = int(places[-1]) + length
            return tokens[begin : begin + most]
    return tokens[:0]


def drafts_per_request(most: int, decoding: int) -> int:
    """Draft tokens that each of `decoding` requests may have, at most `most`."""
    return min(most, max(0, CHEAP_TOKENS // max(decoding, 1) - 1))
