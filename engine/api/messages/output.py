"""The output of Anthropic's API: messages of blocks, whole and as events."""

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from engine.api.chat_answers import DeltaReader, finish_reason
from engine.api.error_responses import ApiError
from engine.api.reasoning_tokens import ReasoningTokens
from engine.frontend.parsing.json_reader import JsonReader
from engine.frontend.streams import CollectedOutput, Delta, RequestStream

Object = dict[str, Any]
encode = msgspec.json.encode

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
STARTS: dict[str, Object] = {
    "text": {"type": "text", "text": ""},
    # Clients expect a signature, which is Anthropic's proof that the thoughts are its own.
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
}
# By field of a chat's delta: the block, and the delta of its events with the field that has the text.
TEXTS = {"content": ("text", "text_delta", "text"), "reasoning_content": ("thinking", "thinking_delta", "thinking")}
PING = b'event: ping\ndata: {"type":"ping"}\n\n'


def usage(stream: RequestStream, output_tokens: int, thinking: ReasoningTokens | None = None) -> Object:
    """The tokens of a request.

    Args:
        stream: of the request; `input_tokens` are those of its prompt that were not cached.
        output_tokens: so far.
        thinking: counts those of thoughts, in an output that has ended; None: they are not known.
    """
    cached = sum(stream.cached_tokens)
    found: Object = {
        "input_tokens": stream.prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": output_tokens,
    }
    return found if thinking is None else found | {"output_tokens_details": {"thinking_tokens": thinking.finish()}}


def end_fields(output: Delta | CollectedOutput, *, called: bool, short: bool) -> Object:
    """The fields about the end of an output.

    Args:
        output: the last delta, or all of it.
        called: it has tool calls.
        short: it has fewer tokens than `max_tokens`.

    Raises:
        ApiError: the output was ended by the server.
    """
    reason = finish_reason(output.finish_reason, called=called, named=False)  # a forced call is a tool_use too
    if reason not in STOP_REASONS:
        raise ApiError(503, "the server ended the request before its output was complete")
    shown = STOP_REASONS[reason]
    if shown == "max_tokens" and short:
        shown = "model_context_window_exceeded"
    text = output.stop_reason if shown == "end_turn" and isinstance(output.stop_reason, str) else None
    return {"stop_reason": shown if text is None else "stop_sequence", "stop_sequence": text}


def content_blocks(parts: Sequence[Object]) -> list[Object]:
    """The blocks of a whole message, from the deltas of a chat's."""
    blocks: list[Object] = []
    for part in parts:
        if "tool_calls" in part:
            [call] = part["tool_calls"]
            blocks.append(
                {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": arguments_of(call)}
            )
            continue
        [(name, text)] = part.items()
        kind, _, field = TEXTS[name]
        blocks.append(STARTS[kind] | {field: text})
    return blocks


def arguments_of(call: Object) -> Object:
    """The arguments of a call of a chat; those that are complete, if the output was cut off within them."""
    text = call["function"]["arguments"]
    reader = JsonReader(0)
    reader.read(text)
    complete = [one for one in reader.members if one.end >= 0]
    return {_value(text[one.key_begin : one.key_end]): _value(text[one.begin : one.end]) for one in complete}


def _value(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:  # a lone surrogate, which no text can have
        return json.loads(json.dumps(json.loads(text), ensure_ascii=False).encode("utf-8", "replace"))


def whole_message(
    stream: RequestStream,
    head: Object,
    reader: DeltaReader,
    output: CollectedOutput,
    max_tokens: int,
    thinking: ReasoningTokens | None,
) -> Object:
    """The message of a whole output."""
    blocks = content_blocks(reader.read(output.text, final=True))
    tokens = len(output.token_ids)
    end = end_fields(output, called=reader.num_calls > 0, short=tokens < max_tokens)
    if thinking is not None:
        thinking.add(output)
    return head | {"content": blocks} | end | {"usage": usage(stream, tokens, thinking)}


class MessageEvents:
    """Renders the events of one streamed message."""

    def __init__(
        self,
        stream: RequestStream,
        head: Object,
        reader: DeltaReader,
        max_tokens: int,
        thinking: ReasoningTokens | None = None,
    ):
        """Prepare the events.

        Args:
            stream: of the request.
            head: the first fields of the message.
            reader: parses the output.
            max_tokens: of the request.
            thinking: counts the tokens of thoughts; None: the model has none.
        """
        self._stream = stream
        self._head = head
        self._reader = reader
        self._max_tokens = max_tokens
        self._thinking = thinking
        self._tokens = 0
        self._kind: str | None = None  # of the open block
        self._index = -1  # of the last block
        self._last: Delta | None = None
        self._started = False

    @staticmethod
    def begin() -> bytes:
        return b""  # the first event has the number of cached tokens, which the first delta brings

    def render_all(self, deltas: list[Delta]) -> bytes:
        """The events of all deltas since the last write."""
        events: list[bytes] = []
        for delta in deltas:
            if not self._started:
                self._started = True
                empty: Object = {
                    "content": [],
                    "stop_reason": None,
                    "stop_sequence": None,
                    "usage": usage(self._stream, 0),
                }
                events += [_event("message_start", message=self._head | empty), PING]
            self._tokens += len(delta.token_ids)
            if self._thinking is not None:
                self._thinking.add(delta)
            final = delta.finish_reason is not None
            for part in self._reader.read(delta.text, final=final):
                self._add_part(part, events)
            if final:
                self._last = delta
        return b"".join(events)

    def end(self) -> bytes:
        """The events after the last delta."""
        assert self._last is not None, "the stream has ended without a last delta"
        events: list[bytes] = []
        self._close(events)
        short = self._tokens < self._max_tokens
        end = end_fields(self._last, called=self._reader.num_calls > 0, short=short)
        events.append(_event("message_delta", delta=end, usage=usage(self._stream, self._tokens, self._thinking)))
        events.append(_event("message_stop"))
        return b"".join(events)

    @staticmethod
    def failure(error: ApiError) -> bytes:
        """An error as an event; there is no `message_stop` then."""
        return b"event: error\ndata: " + error.anthropic_body() + b"\n\n"

    def _add_part(self, part: Object, events: list[bytes]) -> None:
        if "tool_calls" in part:
            [call] = part["tool_calls"]
            function = call["function"]
            if "id" in call:
                self._open({"type": "tool_use", "id": call["id"], "name": function["name"], "input": {}}, events)
            if function["arguments"]:
                self._add_delta({"type": "input_json_delta", "partial_json": function["arguments"]}, events)
            return
        [(name, text)] = part.items()
        kind, delta, field = TEXTS[name]
        if self._kind != kind:
            self._open(STARTS[kind], events)
        self._add_delta({"type": delta, field: text}, events)

    def _open(self, block: Object, events: list[bytes]) -> None:
        self._close(events)
        self._kind = block["type"]
        self._index += 1
        events.append(_event("content_block_start", index=self._index, content_block=block))

    def _add_delta(self, delta: Object, events: list[bytes]) -> None:
        events.append(_event("content_block_delta", index=self._index, delta=delta))

    def _close(self, events: list[bytes]) -> None:
        if self._kind is not None:
            events.append(_event("content_block_stop", index=self._index))
            self._kind = None


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + encode({"type": kind, **fields}) + b"\n\n"
