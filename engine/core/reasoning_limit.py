"""Ends the reasoning of an output after a number of tokens: a matcher like those of grammars."""

import copy
import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from engine.core.grammar_compiler import WRONG_TOKEN, Vocabulary
from engine.errors import RequestError
from engine.grammar import WORD_BITS
from engine.reasoning import ReasoningBudget, ReasoningMarks

LONGEST_BEGIN = 16  # bytes of the tag at the start of an output
LONGEST_HEADER = 1024  # bytes of the text that begins a further part


@dataclass(frozen=True, slots=True)
class _Form:
    """`ReasoningMarks` in the tokens of a model."""

    pieces: Sequence[bytes]
    begin: re.Pattern[bytes]
    ends: tuple[bytes, ...]
    marker: tuple[int, ...]  # the tokens of the first of the ends
    repeats: bool

    @property
    def longest_end(self) -> int:
        return max(map(len, self.ends))


class ReasoningLimit:
    """Follows one output, with the methods of llguidance's LLMatcher that `engine.core.grammars` uses.

    All tokens are allowed until the budget is used up within the reasoning. From then on only the tokens of its end
    marker are, then all again. Tokens of the marker that the model has just written itself are not written again.
    """

    def __init__(self, marks: ReasoningMarks, vocabulary: Vocabulary):
        """Raises RequestError if the model has no tokens for the end of its reasoning."""
        ends = tuple(end.encode() for end in marks.ends)
        marker = _tokens_of(marks.ends[0], vocabulary)
        begin = re.compile(marks.begin.encode(), re.DOTALL)
        self._form = _Form(vocabulary.pieces, begin, ends, marker, marks.repeats)
        self._budget = 0
        self._used = 0  # tokens of reasoning so far
        self._inside = False  # whether the next token is within the reasoning
        self._text = b""  # the end of the output, in which a mark may have begun
        self._tail: list[int] = []  # the last tokens of the reasoning
        self._error = ""
        self.is_over = False  # no further reasoning can come

    def deep_copy(self) -> Self:
        """A matcher for another output, at its beginning."""
        return copy.copy(self)

    def begin(self, budget: ReasoningBudget) -> None:
        """Set the limit, before the first token."""
        self._budget, self._inside = budget.tokens, budget.is_open

    def unsafe_compute_mask_ptr(self, address: int, num_bytes: int) -> None:
        """Write the mask of the next token to an address."""
        due = self._due()
        ctypes.memset(address, 0xFF if due < 0 else 0, num_bytes)
        if due >= 0:
            word, bit = divmod(due, WORD_BITS)
            ctypes.c_uint32.from_address(address + word * (WORD_BITS // 8)).value = 1 << bit

    def _due(self) -> int:
        """The only token that may come next; -1: any may."""
        if not self._inside or self._used < self._budget:
            return -1
        marker, tail = self._form.marker, self._tail
        lengths = range(min(len(marker) - 1, len(tail)), 0, -1)
        return marker[next((length for length in lengths if tail[-length:] == [*marker[:length]]), 0)]

    def consume_token(self, token: int) -> bool:
        """Add the next token; False if the mask excludes it."""
        due = self._due()
        if due not in (-1, token):
            self._error = f"token {token} {WRONG_TOKEN}: the end of the reasoning, token {due}, is due"
            return False
        pieces = self._form.pieces
        self._tail = [*self._tail[-len(self._form.marker) :], token] if self._inside else []
        self._used += self._read(pieces[token] if token < len(pieces) else b"")
        return True

    def _read(self, piece: bytes) -> bool:
        """Add the text of a token; returns whether it belongs to the reasoning, even if only in part."""
        form, text = self._form, self._text + piece
        fresh = len(text) - len(piece)  # where the token begins
        belongs = False
        while not self.is_over:
            if self._inside:
                at = min((at for end in form.ends if (at := text.find(end)) >= 0), default=-1)
                if at < 0:
                    belongs |= fresh >= 0 or bool(text)
                    text = text[1 - form.longest_end :]
                    break
                belongs |= at > max(fresh, 0)
                self._inside, self.is_over = False, not form.repeats
                text, fresh = text[at:], fresh - at
            elif (found := form.begin.search(text)) is not None:
                self._inside = True
                text, fresh = text[found.end() :], fresh - found.end()
            else:
                text = text[-LONGEST_HEADER:] if form.repeats else text.lstrip()
                self.is_over = not form.repeats and len(text) >= LONGEST_BEGIN
                break
        self._text = text
        return belongs

    def is_accepting(self) -> bool:
        """Whether a stop token ends the output before `min_tokens`, as where a grammar is complete."""
        return False

    def is_stopped(self) -> bool:
        return False

    def is_error(self) -> bool:
        return bool(self._error)

    def get_error(self) -> str:
        return self._error


def _tokens_of(text: str, vocabulary: Vocabulary) -> tuple[int, ...]:
    """The tokens of a mark: a single one if there is one, such as a special token. Raises RequestError."""
    data, pieces = text.encode(), vocabulary.pieces
    whole = next((token for token, piece in enumerate(pieces) if piece == data), -1)
    tokens = vocabulary.encode(text) if whole < 0 else [whole]
    if b"".join(pieces[token] for token in tokens) != data:
        raise RequestError(f"thinking_token_budget: the model has no tokens for {text!r}, the end of its reasoning")
    return tuple(tokens)
