"""The bytes of answers. A streamed chunk is a template made once a request, with the delta's text put in."""

import time
import uuid
from collections.abc import Callable
from typing import Any

import msgspec

from engine.frontend.streams import Delta, RequestStream, TokenLogprob
from engine.frontend.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0  # JSON knows no infinity

encode = msgspec.json.encode


def clamp(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def completion_logprobs(tokenizer: Tokenizer, entries: list[TokenLogprob], offset: int) -> tuple[dict[str, Any], int]:
    """Logprobs as completions show them; `offset` is where in the text the first token begins, the new one is given."""
    tokens, offsets, likeliest = [], [], []
    for entry in entries:
        text = tokenizer.token_text(entry.token)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        shown = {tokenizer.token_text(token): clamp(logprob) for token, logprob in entry.top}
        likeliest.append({text: clamp(entry.logprob)} | shown)
    values = [clamp(entry.logprob) for entry in entries]
    body = {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": likeliest}
    return body, offset


def chat_logprobs(tokenizer: Tokenizer, entries: list[TokenLogprob]) -> dict[str, Any]:
    """Logprobs as chats show them."""

    def shown(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": clamp(logprob), "bytes": list(data)}

    content = [
        shown(entry.token, entry.logprob) | {"top_logprobs": [shown(token, logprob) for token, logprob in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def usage(stream: RequestStream, completion_tokens: int) -> dict[str, Any]:
    prompt_tokens = stream.prompt_tokens
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(stream.cached_tokens)},
    }


class Chunks:
    """Renders the server-sent events of one streamed request: one chunk a delta, also where its text is empty."""

    def __init__(
        self,
        stream: RequestStream,
        tokenizer: Tokenizer,
        head: dict[str, Any],
        *,
        chat: bool,
        include_usage: bool = False,
        continuous_usage: bool = False,
        token_ids: bool = False,
        echo: Callable[[int], str] | None = None,
    ):
        """`head` is what all chunks begin with (id, object, …); `echo` gives the text shown before output `index`."""
        self._stream = stream
        self._tokenizer = tokenizer
        self._chat = chat
        self._include_usage = include_usage
        self._continuous = continuous_usage
        self._token_ids = token_ids
        self._echo = echo
        self._head = b"data: " + encode(head)[:-1]
        self._begins: dict[int, bytes] = {}  # by output
        self._text_end = b"}" if chat else b""
        usage_field = b',"usage":null' if include_usage else b""
        self._plain_end = (
            self._text_end
            + b',"logprobs":null,"finish_reason":null'
            + (b"" if chat else b',"stop_reason":null')
            + b"}]"
            + usage_field
            + b"}\n\n"
        )
        self._tokens = 0
        self._offsets: dict[int, int] = {}

    def render_all(self, deltas: list[Delta]) -> bytes:
        """All that is new since the last write, as one piece of bytes."""
        return self.render(deltas[0]) if len(deltas) == 1 else b"".join(map(self.render, deltas))

    def render(self, delta: Delta) -> bytes:
        """One delta as one event."""
        self._tokens += len(delta.token_ids)
        begin = self._begins.get(delta.index)
        if begin is None:
            begin = self._first(delta)
        if delta.finish_reason is None and delta.logprobs is None and not (self._token_ids or self._continuous):
            return begin + encode(delta.text) + self._plain_end
        return begin + encode(delta.text) + self._rest(delta)

    def _first(self, delta: Delta) -> bytes:
        """What the first chunk of an output begins with: a chat's names the role; later ones are remembered."""
        choice = self._head + b',"choices":[{"index":%d,' % delta.index
        if self._chat:
            self._begins[delta.index] = choice + b'"delta":{"content":'
            return choice + b'"delta":{"role":"assistant","content":'
        if self._echo is not None:
            delta.text = self._echo(delta.index) + delta.text
        self._begins[delta.index] = choice + b'"text":'
        return self._begins[delta.index]

    def _rest(self, delta: Delta) -> bytes:
        fields: dict[str, Any] = {"logprobs": None, "finish_reason": delta.finish_reason}
        if delta.finish_reason is not None or not self._chat:
            fields["stop_reason"] = delta.stop_reason
        if delta.logprobs is not None:
            fields["logprobs"] = self._logprobs(delta.index, delta.logprobs)
        if self._token_ids:
            fields["token_ids"] = delta.token_ids
        after: dict[str, Any] = {}
        if self._include_usage:
            after["usage"] = usage(self._stream, self._tokens) if self._continuous else None
        end = b"]," + encode(after)[1:] if after else b"]}"
        return self._text_end + b"," + encode(fields)[1:] + end + b"\n\n"

    def _logprobs(self, index: int, entries: list[TokenLogprob]) -> dict[str, Any]:
        if self._chat:
            return chat_logprobs(self._tokenizer, entries)
        body, self._offsets[index] = completion_logprobs(self._tokenizer, entries, self._offsets.get(index, 0))
        return body

    def end(self) -> bytes:
        """The event after the last delta: usage, if it was asked for."""
        if not self._include_usage:
            return b""
        return self._head + b',"choices":[],"usage":' + encode(usage(self._stream, self._tokens)) + b"}\n\n"


def new_head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """The fields that all chunks of an answer share."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
