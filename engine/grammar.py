"""Grammars of requests, and the masks that they become, as they cross process boundaries."""

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.arrays import Int32s
from engine.columns import column, int32s

MAX_GRAMMAR_BYTES = 256 << 10  # of one request's grammar
MAX_COMPILING = 256  # grammars of a core that wait to be compiled
TOO_MANY = f"{MAX_COMPILING} grammars wait to be compiled: try again later"
KINDS = ("json_schema", "regex", "lark", "ebnf", "structural_tag")


class Grammar(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a request's output must conform to."""

    kind: str  # one of KINDS
    text: str  # json_schema, structural_tag: JSON


class GrammarCheck(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The core's answer to the utility `check_grammar`."""

    cause: str  # why the grammar can't be used; empty: it can
    compile_s: float  # seconds of its compilation; negative if it had been compiled for an earlier request


class StepMasks(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The tokens that slots of a step may sample: a bit for each token, the first in the lowest bit of a word."""

    slots: bytes  # int32[n]
    words: bytes  # int32[n, words]


def encode_masks(slots: list[int], words: NDArray[np.int32]) -> bytes:
    return msgspec.msgpack.encode(StepMasks(column(slots), words.tobytes()))


class TokenMasks:
    """The masks of one step, as a worker uses them."""

    def __init__(self, data: bytes):
        found = msgspec.msgpack.decode(data, type=StepMasks)
        slots = int32s(found.slots).tolist()
        words = int32s(found.words).reshape(len(slots), -1)
        self._rows: dict[int, Int32s] = dict(zip(slots, words, strict=True))

    def accepted(self, slot: int, vocabulary: int) -> NDArray[np.bool_] | None:
        """Which of the tokens a slot may sample, bool[vocabulary]; None: it has no mask."""
        row = self._rows.get(slot)
        if row is None:
            return None
        bits = np.unpackbits(row.view(np.uint8), bitorder="little")[:vocabulary].view(np.bool_)
        return bits if len(bits) == vocabulary else np.pad(bits, (0, vocabulary - len(bits)))
