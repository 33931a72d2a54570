"""Grammars of requests, and the masks that they become, as they cross process boundaries."""

from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.arrays import Int64s
from engine.columns import column, int32s

MAX_GRAMMAR_BYTES = 256 << 10  # of one request's grammar
MAX_COMPILING = 256  # grammars of a core that wait to be compiled
TOO_MANY = f"{MAX_COMPILING} grammars wait to be compiled: try again later"
WORD_BITS = 32  # tokens of a word of a mask
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


@dataclass(frozen=True, slots=True)
class RowMasks:
    """The tokens that some rows of a step may sample.

    at: int64[n], the rows. words: int32[n, words], a bit for each token, as in `StepMasks`.
    """

    at: Int64s
    words: NDArray[np.int32]

    def reaching(self, tokens: int) -> NDArray[np.int32]:
        """The words, contiguous, at least as many as `tokens` need; words that are missing exclude their tokens."""
        missing = -(-tokens // WORD_BITS) - self.words.shape[1]
        return np.ascontiguousarray(np.pad(self.words, ((0, 0), (0, missing))) if missing > 0 else self.words)

    def of_tokens(self, first: int, count: int) -> "RowMasks":
        """The masks of `count` tokens from `first` on, which become the tokens from 0 on."""
        words = self.reaching(first + count + WORD_BITS).view(np.uint32)
        begin, shift = divmod(first, WORD_BITS)
        number = -(-count // WORD_BITS)
        low = words[:, begin : begin + number] >> np.uint32(shift)
        if shift:
            low = low | words[:, begin + 1 : begin + number + 1] << np.uint32(WORD_BITS - shift)
        return RowMasks(self.at, low.view(np.int32))

    def accepted(self, row: int, tokens: int) -> NDArray[np.bool_]:
        """Which of the tokens the nth of the rows may sample, bool[tokens]."""
        return _unpacked(self.words[row], tokens)


class TokenMasks:
    """The masks of one step, as a worker uses them."""

    def __init__(self, data: bytes):
        found = msgspec.msgpack.decode(data, type=StepMasks)
        slots = int32s(found.slots)
        self._words = int32s(found.words).reshape(len(slots), -1)
        self._of: dict[int, int] = {slot: number for number, slot in enumerate(slots.tolist())}

    def of(self, slots: Int64s, at: Int64s) -> RowMasks | None:
        """The masks of slots whose rows are `at`; slots without a mask are left out. None: no slot has one."""
        pairs = zip(slots.tolist(), at.tolist(), strict=True)
        found = [(row, self._of[slot]) for slot, row in pairs if slot in self._of]
        if not found:
            return None
        rows, numbers = map(list, zip(*found, strict=True))
        words = self._words if numbers == list(range(len(self._words))) else self._words[numbers]
        return RowMasks(np.array(rows, dtype=np.int64), words)

    def accepted(self, slot: int, vocabulary: int) -> NDArray[np.bool_] | None:
        """Which of the tokens a slot may sample, bool[vocabulary]; None: it has no mask."""
        number = self._of.get(slot)
        return None if number is None else _unpacked(self._words[number], vocabulary)


def _unpacked(words: NDArray[np.int32], tokens: int) -> NDArray[np.bool_]:
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:tokens].view(np.bool_)
    return bits if len(bits) == tokens else np.pad(bits, (0, tokens - len(bits)))
