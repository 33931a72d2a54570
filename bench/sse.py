"""Reads a streamed answer after the fact: which bytes carried which tokens."""

import re
from dataclasses import dataclass, field
from typing import Any

import msgspec

_BLANK_LINE = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_LINE_END = re.compile(rb"\r\n|\n|\r")
DONE = b"[DONE]"


@dataclass(slots=True)
class Event:
    """One server-sent event: its data, and the offset of its last byte in the body."""

    data: bytes
    last: int


@dataclass(slots=True)
class StreamedAnswer:
    """What an event stream said; `places` and `tokens` have one entry a chunk that carried tokens."""

    places: list[int] = field(default_factory=list)  # offset of each chunk's last byte in the body
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int = 0
    ended: bool = False  # [DONE], a finish reason or the final usage was seen
    malformed: str = ""  # an event that could not be read
    error: str = ""  # what the server reported in the stream


@dataclass(slots=True)
class _Chunk:
    place: int
    weight: int  # characters of text
    tokens: int | None  # said by the chunk itself
    closing: bool  # carries a finish reason


def split_events(body: bytes) -> list[Event]:
    """Events of a body; what follows the last blank line is none yet."""
    events: list[Event] = []
    start = 0
    for blank in _BLANK_LINE.finditer(body):
        data = _data_of(body[start : blank.start()])
        if data is not None:
            events.append(Event(data, blank.end() - 1))
        start = blank.end()
    return events


def read_stream(body: bytes) -> StreamedAnswer:
    """Parse the events of an OpenAI completion or chat stream; problems are recorded, not raised."""
    answer = StreamedAnswer()
    chunks: list[_Chunk] = []
    for event in split_events(body):
        if event.data.strip() == DONE:
            answer.ended = True
            break
        try:
            message = msgspec.json.decode(event.data)
            if not isinstance(message, dict):
                raise TypeError("no object")
            _read_message(message, event.last, answer, chunks)
        except (msgspec.DecodeError, UnicodeDecodeError, TypeError, ValueError, KeyError, AttributeError):
            answer.malformed = f"an event of the stream can't be read: {_excerpt(event.data)}"
            break
        if answer.error:
            break
    _count_tokens(chunks, answer)
    return answer


def error_message(body: bytes) -> str:
    """The server's own words in the body of an error answer."""
    try:
        message: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _excerpt(body)
    for _ in range(2):
        if isinstance(message, dict):
            message = next((message[key] for key in ("error", "message", "detail") if key in message), message)
    return message if isinstance(message, str) else _excerpt(body)


def spread(total: int, weights: list[int]) -> list[int]:
    """`total` split in proportion to weights by largest remainder, at least 1 each where the total allows."""
    if not weights:
        return []
    least = 1 if total >= len(weights) else 0
    left = total - least * len(weights)
    whole = sum(weights)
    if whole == 0:
        weights, whole = [1] * len(weights), len(weights)
    shares = [divmod(left * weight, whole) for weight in weights]
    counts = [least + quotient for quotient, _ in shares]
    order = sorted(range(len(weights)), key=lambda i: (-shares[i][1], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _data_of(block: bytes) -> bytes | None:
    """The data of one event, None for a comment or an event without any."""
    if block.startswith(b"data: ") and b"\n" not in block and b"\r" not in block:
        return block[6:]
    lines = []
    for line in _LINE_END.split(block):
        name, _, value = line.partition(b":")
        if name == b"data":
            lines.append(value.removeprefix(b" "))
    return b"\n".join(lines) if lines else None


def _read_message(message: dict[str, Any], place: int, answer: StreamedAnswer, chunks: list[_Chunk]) -> None:
    if message.get("error"):
        error = message["error"]
        text = error.get("message") if isinstance(error, dict) else error
        answer.error = str(text or error)
        return
    usage = message.get("usage")
    if usage:
        if usage.get("prompt_tokens") is not None:
            answer.prompt_tokens = int(usage["prompt_tokens"])
        answer.completion_tokens = int(usage.get("completion_tokens") or 0)
        answer.cached_tokens = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    choices = message.get("choices")
    if choices is None and not usage:
        raise KeyError("choices")
    for choice in choices or []:
        chunk = _read_choice(choice, place)
        answer.ended = answer.ended or bool(choice.get("finish_reason"))
        if chunk is not None:
            chunks.append(chunk)
    if usage and not choices:
        answer.ended = True


def _read_choice(choice: dict[str, Any], place: int) -> _Chunk | None:
    delta = choice.get("delta")
    tokens = _said_tokens(choice)
    if delta is None:
        weight = len(choice["text"] or "")
        opening = False
    else:
        texts = (delta.get("content"), delta.get("reasoning_content"), delta.get("reasoning"))
        weight = sum(len(text) for text in texts if text)
        weight += len(msgspec.json.encode(delta["tool_calls"])) if delta.get("tool_calls") else 0
        opening = "role" in delta and weight == 0  # announces the answer, carries no token
    closing = bool(choice.get("finish_reason"))
    if opening and not tokens and not closing:
        return None
    return _Chunk(place, weight, tokens, closing)


def _said_tokens(choice: dict[str, Any]) -> int | None:
    logprobs = choice.get("logprobs")
    if logprobs and logprobs.get("tokens") is not None:
        return len(logprobs["tokens"])
    if choice.get("token_ids") is not None:
        return len(choice["token_ids"])
    return None


def _excerpt(data: bytes) -> str:
    text = " ".join(data.decode("utf-8", "replace").split())
    return text if len(text) <= 200 else text[:200] + " …"


def _count_tokens(chunks: list[_Chunk], answer: StreamedAnswer) -> None:
    """Give each chunk its tokens: as it says itself, else so that they sum to the server's usage.

    An empty text can be a token (half a character) or only the bearer of the finish reason; the total decides.
    """
    total = answer.completion_tokens
    texts = [c for c in chunks if c.weight]
    without_closing = [c for c in chunks if c.weight or not c.closing]
    if texts and all(c.tokens is not None for c in texts):
        counts = [c.tokens or 0 for c in chunks]
    elif total is None:
        chunks, counts = without_closing, [1] * len(without_closing)
    else:
        exact = next((some for some in (chunks, without_closing, texts) if len(some) == total), None)
        chunks = exact if exact is not None else (without_closing or chunks)
        counts = spread(total, [c.weight for c in chunks])
    for chunk, count in zip(chunks, counts, strict=True):
        if count:
            answer.places.append(chunk.place)
            answer.tokens.append(count)
