"""Logprobs in responses: the object of completions and that of chats.

A token is written as its text. A token that is a part of a character is written as OpenAI's completions do, `bytes:`
and each byte as `\\xNN`, so that two such tokens never have the same key.
"""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from engine.frontend.detokenizer import LONGEST_CHARACTER, WindowDecoder
from engine.frontend.streams import RequestStream, TokenLogprob
from engine.frontend.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0  # JSON has no infinity


def clamp(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def token_id_text(token: int) -> str:
    """A token as vLLM's `return_tokens_as_token_ids` writes it."""
    return f"token_id:{token}"


def token_key(tokenizer: Tokenizer, token: int) -> str:
    """A token as a key: its text, or its bytes if they are not valid UTF-8."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class TextOffsets:
    """The offset of each token in the text of an output, in characters; computed token by token.

    All tokens of a character have the offset of the character. A special token that is not in the text has the offset
    of the next token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        start: int = 0,
        prompt: Sequence[int] = (),
        skip_special: bool = True,
        hidden: int = 0,
    ):
        """Args:
        start: characters of text before the first token, e.g. of an echoed prompt.
        prompt: the tokens before the first one.
        skip_special: whether special tokens are left out of the text.
        hidden: number of first tokens that are left out of the text.
        """
        self._hidden = hidden
        self._at = start
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._piece = tokenizer.piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._window: WindowDecoder | None = None
        if not tokenizer.concatenates:
            self._window = WindowDecoder(tokenizer, skip_special, list(prompt[-LONGEST_CHARACTER:]))

    def next(self, token: int) -> int:
        """Add the next token; returns its offset."""
        begin = self._at
        if self._hidden:
            self._hidden -= 1
            return begin
        if self._window is not None:
            self._at += len(self._window.push((token,)))
            return begin
        data = b"" if token in self._skip else self._piece(token)
        decode, state = self._decoder.decode, self._decoder.getstate
        if data and state()[0]:
            # The first byte continues a character, or cuts it off; U+FFFD then stands for the incomplete character.
            first = decode(data[:1])
            if len(first) == 2 or (first and state()[0]):
                begin += 1
            self._at += len(first)
            data = data[1:]
        self._at += len(decode(data))
        return begin

    @classmethod
    def of_output(cls, tokenizer: Tokenizer, stream: RequestStream, index: int, start: int = 0) -> "TextOffsets":
        """For output `index` of a stream, whose text has `start` characters before the first token."""
        prompt = stream.prompts[index // stream.params.n]
        known = prompt if isinstance(prompt, list) else ()
        return cls(tokenizer, start=start, prompt=known, skip_special=stream.params.skip_special_tokens)


def completion_logprobs(
    tokenizer: Tokenizer,
    entries: Iterable[TokenLogprob],
    offsets: TextOffsets,
    text_length: int | None = None,
    *,
    as_token_ids: bool = False,
) -> dict[str, Any]:
    """Logprobs in the form of completions.

    Args:
        entries: of the tokens, in order.
        offsets: of the output so far; advanced by these tokens.
        text_length: characters of the whole text, once known. It limits offsets, as a stop string may cut off tokens.
        as_token_ids: write each token as `token_id:N`.
    """

    def key(token: int) -> str:
        return token_id_text(token) if as_token_ids else token_key(tokenizer, token)

    tokens, places, values, tops = [], [], [], []
    for entry in entries:
        text = key(entry.token)
        tokens.append(text)
        place = offsets.next(entry.token)
        places.append(place if text_length is None else min(place, text_length))
        values.append(clamp(entry.logprob))
        top = {text: clamp(entry.logprob)}
        for token, logprob in entry.top:
            if token == entry.token:
                continue
            name = key(token)
            top[token_id_text(token) if name in top else name] = clamp(logprob)
        tops.append(top)
    return {"text_offset": places, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}


def echoed_logprobs(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    scored: Sequence[TokenLogprob | None],
    offsets: TextOffsets,
    text_length: int,
    *,
    as_token_ids: bool = False,
) -> dict[str, Any]:
    """Logprobs of an echoed prompt; its first token has none.

    Args:
        prompt: token ids.
        scored: logprobs of each; those of the first token are ignored.
        offsets, text_length: of the echoed prompt.
        as_token_ids: write each token as `token_id:N`.
    """
    first = token_id_text(prompt[0]) if as_token_ids else token_key(tokenizer, prompt[0])
    begin = offsets.next(prompt[0])
    rest = [entry for entry in scored[1:] if entry is not None]
    found = completion_logprobs(tokenizer, rest, offsets, text_length, as_token_ids=as_token_ids)
    nothing = {"text_offset": begin, "token_logprobs": None, "tokens": first, "top_logprobs": None}
    return concatenate({name: [value] for name, value in nothing.items()}, found)


def concatenate(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Concatenate the logprobs of two parts of a completion."""
    return {name: one[name] + other[name] for name in one}


def limit_alternatives(entries: Iterable[TokenLogprob | None], top: int) -> list[TokenLogprob | None]:
    """The entries with at most `top` alternatives."""
    return [entry and msgspec.structs.replace(entry, top=entry.top[:top]) for entry in entries]


def prompt_logprobs(
    tokenizer: Tokenizer, scored: Iterable[TokenLogprob | None], top: int
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's prompt_logprobs: a map of token ids for each token, its own id first; null for the first token."""

    def shown(token: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": clamp(logprob), "rank": rank, "decoded_token": tokenizer.token_text(token)}

    found: list[dict[str, dict[str, Any]] | None] = []
    for entry in limit_alternatives(scored, top):
        if entry is None:
            found.append(None)
            continue
        each = {str(entry.token): shown(entry.token, entry.logprob, entry.rank)}
        for rank, (token, logprob) in enumerate(entry.top, start=1):
            each.setdefault(str(token), shown(token, logprob, rank))
        found.append(each)
    return found


def chat_logprobs(
    tokenizer: Tokenizer, entries: Iterable[TokenLogprob], *, as_token_ids: bool = False
) -> dict[str, Any]:
    """Logprobs in the form of chats: lists, where each token has its text and its bytes."""

    def shown(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        text = token_id_text(token) if as_token_ids else data.decode("utf-8", "replace")
        return {"token": text, "logprob": clamp(logprob), "bytes": list(data)}

    content = [
        shown(entry.token, entry.logprob) | {"top_logprobs": [shown(token, logprob) for token, logprob in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}
