"""From token ids to text, token by token: whole characters only, and stop strings across token boundaries."""

import codecs
from collections.abc import Sequence
from typing import Protocol

from engine.frontend.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
# A character has at most four bytes: a text that still ends in U+FFFD after this many tokens is not going to be valid.
LONGEST_CHARACTER = 8


class Decoder(Protocol):
    """Turns ids into text; `push` may hold back an incomplete character, `finish` returns the rest."""

    def push(self, ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


class PieceDecoder:
    """For tokenizers whose text is the concatenation of their tokens' bytes."""

    __slots__ = ("_decode", "_pieces", "_skip")

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int]):
        """`hidden`: tokens that are left out."""
        self._pieces = tokenizer.piece
        self._skip = hidden
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, ids: Sequence[int]) -> str:
        skip, piece = self._skip, self._pieces
        return self._decode(b"".join([piece(token) for token in ids if token not in skip]))

    def finish(self) -> str:
        return self._decode(b"", True)


class WindowDecoder:
    """For any other tokenizer: decodes a window of the last tokens and returns the text that is new.

    Some decoders treat the first token of a text differently, so the window starts with the end of the prompt.
    """

    __slots__ = ("_begin", "_hidden", "_ids", "_read", "_skip", "_tokenizer")

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool,
        prompt_tail: Sequence[int],
        hidden: frozenset[int] = frozenset(),
    ):
        """`hidden`: tokens that are left out, besides special ones with `skip_special_tokens`."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._hidden = hidden
        self._ids = [token for token in prompt_tail if token not in hidden]
        self._begin = 0
        self._read = len(self._ids)

    def push(self, ids: Sequence[int]) -> str:
        text = ""
        for token in ids:
            if token in self._hidden:
                continue
            self._ids.append(token)
            text += self._decode_new(len(self._ids) - self._read > LONGEST_CHARACTER)
        return text

    def finish(self) -> str:
        return self._decode_new(True)

    def _decode_new(self, incomplete: bool) -> str:
        """The text of the tokens since the last call; `incomplete`: even if it ends within a character."""
        before = self._tokenizer.decode(self._ids[self._begin : self._read], self._skip)
        now = self._tokenizer.decode(self._ids[self._begin :], self._skip)
        if len(now) <= len(before) or (now.endswith(REPLACEMENT) and not incomplete):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        if self._begin > 64:
            del self._ids[: self._begin]
            self._read -= self._begin
            self._begin = 0
        return now[len(before) :]


class StopStrings:
    """Finds the first of several strings in a text that arrives in pieces; holds back what may become one.

    A string that ends within the first `early` pieces is ignored; one that begins there and ends later counts.
    """

    __slots__ = ("_early", "_held", "_include", "_keep", "_passed", "_stops")

    def __init__(self, stops: Sequence[str], include: bool, early: int = 0):
        self._stops = tuple(stops)
        self._include = include
        self._keep = max(map(len, self._stops)) - 1
        self._held = ""
        self._early = early
        self._passed = 0  # characters of `_held` that belong to early pieces

    def push(self, text: str) -> tuple[str, str | None]:
        """Add text; returns the text that may be shown, and the stop string if one is complete."""
        text = self._held + text
        if self._early:
            self._early -= 1
            self._passed = len(text)
        # The first to end counts, the longest of several: the result does not depend on where the pieces end.
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := self._find(text, stop)) >= 0]
        if ends:
            end, at, stop = min(ends)
            self._held = ""
            return text[: end if self._include else at], stop
        keep = self._open_end(text)
        shown = len(text) - keep
        self._held = text[shown:]
        self._passed = max(0, self._passed - shown)
        return text[:shown], None

    def _find(self, text: str, stop: str) -> int:
        """Where a stop string begins that ends after the early pieces; -1: nowhere."""
        return text.find(stop, max(0, self._passed - len(stop) + 1))

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held

    def _open_end(self, text: str) -> int:
        """The length of the longest suffix of the text that is a prefix of a stop string."""
        for length in range(min(self._keep, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


class Detokenizer:
    """The text of one request's output."""

    __slots__ = ("_decoder", "_stops")

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        visible_ids: Sequence[int] = (),
        min_tokens: int = 0,
    ):
        """Args:
        tokenizer: of the model.
        prompt: the tokens before the output.
        stop: strings that end the text.
        include_stop: leave the stop string in the text.
        skip_special_tokens: leave special tokens out of the text.
        visible_ids: special tokens that stay in the text all the same.
        min_tokens: no stop string ends the text within so many tokens.
        """
        hidden = tokenizer.special_ids.difference(visible_ids) if skip_special_tokens else frozenset()
        tail = list(prompt[-LONGEST_CHARACTER:])
        self._decoder: Decoder
        if tokenizer.concatenates:
            self._decoder = PieceDecoder(tokenizer, hidden)
        elif visible_ids:
            self._decoder = WindowDecoder(tokenizer, False, tail, hidden)
        else:
            self._decoder = WindowDecoder(tokenizer, skip_special_tokens, tail)
        self._stops = StopStrings(stop, include_stop, min_tokens) if stop else None

    def push(self, token: int) -> tuple[str, str | None]:
        """Add one token; returns the text that may be shown now, and the stop string if it completed one."""
        text = self._decoder.push((token,))
        return (text, None) if self._stops is None else self._stops.push(text)

    def finish(self) -> str:
        """The text held back so far; called if no stop string ended the output."""
        text = self._decoder.finish()
        if self._stops is None:
            return text
        shown, stop = self._stops.push(text)
        return shown if stop is not None else shown + self._stops.finish()
