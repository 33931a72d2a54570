"""The bytes of responses. A streamed chunk is a template, made once per request, with the text of a delta."""

import time
import uuid
from collections.abc import Callable
from typing import Any

import msgspec

from engine.api.error_responses import ApiError
from engine.api.logprobs import TextOffsets, chat_logprobs, completion_logprobs, concatenate
from engine.api.protocol import SampledRequest, StreamOptions
from engine.api.shown_prompts import EchoedPrompts, ShownPrompts
from engine.frontend.streams import Delta, RequestStream, TokenLogprob
from engine.frontend.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"

encode = msgspec.json.encode


def usage(stream: RequestStream, completion_tokens: int, reasoning_tokens: int | None = None) -> dict[str, Any]:
    """The `usage` of a request; `reasoning_tokens` None: the model's form of reasoning is unknown."""
    prompt_tokens = stream.prompt_tokens
    found: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(stream.cached_tokens)},
    }
    if reasoning_tokens is not None:
        found["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return found


class ChunkOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What chunks contain besides the text."""

    include_usage: bool = False  # in a chunk after the last delta
    continuous_usage: bool = False  # also in every chunk
    token_ids: bool = False
    as_token_ids: bool = False  # tokens of logprobs are written as `token_id:N`


PLAIN = ChunkOptions()


def chunk_options(body: SampledRequest) -> ChunkOptions:
    options = body.stream_options or StreamOptions()
    return ChunkOptions(
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.continuous_usage_stats),
        token_ids=bool(body.return_token_ids),
        as_token_ids=bool(body.return_tokens_as_token_ids),
    )


class Chunks:
    """Renders the server-sent events of one streamed request: one chunk per delta, also if its text is empty."""

    def __init__(
        self,
        stream: RequestStream,
        tokenizer: Tokenizer,
        head: dict[str, Any],
        *,
        chat: bool,
        options: ChunkOptions = PLAIN,
        echo: Callable[[int], str] | None = None,
        prompts: ShownPrompts | None = None,
    ):
        """Prepare the templates.

        Args:
            stream: of the request.
            tokenizer: for logprobs.
            head: the fields that all chunks begin with (id, object, …).
            chat: the form of chats; otherwise that of completions.
            options: what chunks contain besides the text.
            echo: returns the text shown before the output of an index.
            prompts: what the first chunk of an output contains about its prompt.
        """
        self._stream = stream
        self._tokenizer = tokenizer
        self._chat = chat
        self._include_usage = options.include_usage
        self._continuous = options.include_usage and options.continuous_usage
        self._token_ids = options.token_ids
        self._as_token_ids = options.as_token_ids
        self._echo = echo
        self._prompts = prompts
        self._head = b"data: " + encode(head)[:-1]
        self._begins: dict[int, bytes] = {}  # by output
        self._text_end = b"}" if chat else b""
        usage_field = b',"usage":null' if options.include_usage else b""
        self._plain_end = (
            self._text_end
            + b',"logprobs":null,"finish_reason":null'
            + (b"" if chat else b',"stop_reason":null')
            + b"}]"
            + usage_field
            + b"}\n\n"
        )
        self._tokens = 0
        self._offsets: dict[int, TextOffsets] = {}  # by output, for logprobs
        self._shown: dict[int, int] = {}  # by output, characters of its text so far

    @staticmethod
    def begin() -> bytes:
        return b""

    def render_all(self, deltas: list[Delta]) -> bytes:
        """All deltas since the last write, as one string of bytes."""
        return self.render(deltas[0]) if len(deltas) == 1 else b"".join(map(self.render, deltas))

    def render(self, delta: Delta) -> bytes:
        """One delta as one event."""
        begin = self._begins.get(delta.index)
        if begin is None:
            return self._render_first(delta)
        self._tokens += len(delta.token_ids)
        if delta.finish_reason is None and delta.logprobs is None and not (self._token_ids or self._continuous):
            return begin + encode(delta.text) + self._plain_end
        return begin + encode(delta.text) + self._rest(delta)

    def _render_first(self, delta: Delta) -> bytes:
        """The first delta of an output, with fields about its prompt."""
        scored, about = None, {}
        if self._prompts is not None:
            about = self._prompts.fields(delta.index)
            if isinstance(self._prompts, EchoedPrompts):
                self._prompts.cut(delta)
                scored = self._prompts.logprobs(delta.index)
        self._tokens += len(delta.token_ids)
        begin = self._first(delta)
        return begin + encode(delta.text) + self._rest(delta, scored, about)

    def _first(self, delta: Delta) -> bytes:
        """The beginning of an output's first chunk, in chats with the role; also keeps that of its later chunks."""
        choice = self._head + b',"choices":[{"index":%d,' % delta.index
        if self._echo is not None:
            delta.text = self._echo(delta.index) + delta.text
        if self._chat:
            self._begins[delta.index] = choice + b'"delta":{"content":'
            return choice + b'"delta":{"role":"assistant","content":'
        self._begins[delta.index] = choice + b'"text":'
        return self._begins[delta.index]

    def _rest(self, delta: Delta, scored: dict[str, Any] | None = None, about: dict[str, Any] | None = None) -> bytes:
        """The fields after the text; `scored`: logprobs of an echoed prompt; `about`: other fields about the prompt."""
        fields: dict[str, Any] = {"logprobs": None, "finish_reason": delta.finish_reason}
        if delta.finish_reason is not None or not self._chat:
            fields["stop_reason"] = delta.stop_reason
        if delta.logprobs is not None:
            fields["logprobs"] = self._logprobs(delta, delta.logprobs)
            if scored is not None:
                fields["logprobs"] = concatenate(scored, fields["logprobs"])
        if self._token_ids:
            fields["token_ids"] = delta.token_ids
        after: dict[str, Any] = {}
        if about:
            (after if self._chat and delta.index == 0 else fields).update(about)
        if self._include_usage:
            after["usage"] = self._usage() if self._continuous else None
        end = b"]," + encode(after)[1:] if after else b"]}"
        return self._text_end + b"," + encode(fields)[1:] + end + b"\n\n"

    def _logprobs(self, delta: Delta, entries: list[TokenLogprob]) -> dict[str, Any]:
        if self._chat:
            return chat_logprobs(self._tokenizer, entries, as_token_ids=self._as_token_ids)
        index = delta.index
        offsets = self._offsets.get(index)
        if offsets is None:
            start = 0 if self._echo is None else len(self._echo(index))
            offsets = self._offsets[index] = TextOffsets.of_output(self._tokenizer, self._stream, index, start)
        self._shown[index] = shown = self._shown.get(index, 0) + len(delta.text)
        length = shown if delta.finish_reason is not None else None
        return completion_logprobs(self._tokenizer, entries, offsets, length, as_token_ids=self._as_token_ids)

    def end(self) -> bytes:
        """The events after the last delta: usage, if requested, and the mark of the end."""
        if not self._include_usage:
            return DONE
        return self._head + b',"choices":[],"usage":' + encode(self._usage()) + b"}\n\n" + DONE

    def _usage(self) -> dict[str, Any]:
        return usage(self._stream, self._tokens)

    @staticmethod
    def failure(error: ApiError) -> bytes:
        """An error as an event, without [DONE], which would mark the response as complete.

        OpenAI's client raises at the event; other clients see a stream that does not end properly.
        """
        return b"data: " + error.body() + b"\n\n"


def new_head(prefix: str, kind: str, model: str, own_id: str = "", fingerprint: str = "") -> dict[str, Any]:
    """The fields that all chunks of a response have.

    Args:
        prefix: of the id.
        kind: the `object`.
        model: the name under which the client asked for it.
        own_id: the client's name of the request; empty if it gave none.
        fingerprint: of outputs, see `system_fingerprint`; empty: the response has none.
    """
    name = f"{prefix}-{own_id or uuid.uuid4().hex}"
    head = {"id": name, "object": kind, "created": int(time.time()), "model": model}
    return head | {"system_fingerprint": fingerprint} if fingerprint else head
