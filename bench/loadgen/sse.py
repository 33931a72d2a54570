"""Parses a recorded stream of server-sent events: which bytes carried which tokens."""

import re
from dataclasses import dataclass, field
from typing import Any

import msgspec

# A line ends with CRLF, LF or CR, in any mixture; two consecutive line ends end an event. Atomic: CRLF is one line end.
_BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r){2}")
_LINE_END = re.compile(rb"\r\n|\n|\r")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_TITLE = re.compile(rb"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)
_DEFAULT_NAMES = frozenset({b"", b"message"})
_FAILED = frozenset({"error", "abort"})  # finish reasons of a failed response
_MOST_TOKENS = 1 << 31
DONE = b"[DONE]"


@dataclass(slots=True)
class Event:
    """One server-sent event: its data, the offset of its last byte in the body, and its name or ""."""

    data: bytes
    last: int
    name: bytes = b""


@dataclass(slots=True)
class StreamedResponse:
    """A parsed event stream; `places` and `tokens` have one entry per chunk that carried tokens."""

    places: list[int] = field(default_factory=list)  # offset of each chunk's last byte in the body
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int = 0
    ended: bool = False  # [DONE], a finish reason or the final usage was seen
    finish: str = ""  # the last finish reason
    malformed: str = ""  # message about an event that could not be parsed
    error: str = ""  # error that the server reported in the stream
    events: int = 0  # number of events with data


@dataclass(slots=True)
class _Chunk:
    place: int
    weight: int  # characters of text
    tokens: int | None  # if the chunk itself lists them
    closing: bool  # has a finish reason


def read_stream(body: bytes, requested: int | None = None) -> StreamedResponse:
    """Parse the events of an OpenAI completion or chat stream; problems are recorded, not raised.

    Events that are not chunks (other names, objects without choices, comments) are ignored. `requested`, the requested
    length, is the output length if the finish reason is "length" and the server reports no usage.
    """
    response = StreamedResponse()
    chunks: list[_Chunk] = []
    events, rest = _events(body)
    if rest is not None and _is_whole(rest.data):
        events.append(rest)
    for event in events:
        response.events += 1
        if event.data.strip() == DONE:
            response.ended = True
            break
        try:
            _read_event(event, response, chunks)
        except (msgspec.DecodeError, TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError):
            response.malformed = f"an event of the stream cannot be parsed: {_excerpt(event.data)}"
        if response.malformed or response.error:
            break
    _count_tokens(chunks, response, requested)
    return response


def error_message(body: bytes) -> str:
    """The server's message in the body of an error response."""
    message = _decoded(body)
    for _ in range(2):
        if isinstance(message, dict):
            message = next((message[key] for key in ("error", "message", "detail") if key in message), message)
    if isinstance(message, str):
        return _shortened(message)
    return _page_title(body) or _excerpt(body)


def describe_non_stream(body: bytes, media: str) -> str:
    """A message that describes a response with HTTP 200 but no events; `media` is its Content-Type."""
    text = body.strip()
    if not text:
        return "the server answered HTTP 200 with an empty body instead of a stream"
    if media == "text/html" or text[:1] == b"<":
        return f"the server answered HTTP 200 with a page instead of a stream: {_page_title(body) or _excerpt(body)}"
    message = _decoded(text)
    if isinstance(message, dict) and message.get("choices"):
        return 'the server answered with one JSON object instead of a stream: it ignores "stream": true'
    if isinstance(message, dict | list):
        return f"the server answered HTTP 200 with JSON instead of a stream: {error_message(text)}"
    lines = text.splitlines()
    if len(lines) > 1 and isinstance(_decoded(lines[0]), dict):
        return f"the server answered with lines of JSON instead of server-sent events: {_excerpt(lines[0])}"
    kind = f" of type {media}" if media and media != "text/event-stream" else ""
    return f"the server answered HTTP 200 with text{kind} that contains no events: {_excerpt(body)}"


def spread(total: int, weights: list[int]) -> list[int]:
    """`total` divided in proportion to the weights by largest remainder, each at least 1 if the total suffices.

    Example: spread(5, [1, 1, 4]) is [1, 1, 3].
    """
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


def _events(body: bytes) -> tuple[list[Event], Event | None]:
    """The events of a body, and the unterminated event after the last blank line."""
    events: list[Event] = []
    start = len(_BYTE_ORDER_MARK) if body.startswith(_BYTE_ORDER_MARK) else 0
    for blank in _BLANK_LINE.finditer(body, start):
        event = _event(body[start : blank.start()], blank.end() - 1)
        if event is not None:
            events.append(event)
        start = blank.end()
    return events, _event(body[start:], len(body) - 1)


def _event(block: bytes, last: int) -> Event | None:
    """One event; None for a comment or an event without data."""
    if block.startswith(b"data: ") and b"\n" not in block and b"\r" not in block:
        return Event(block[6:], last) if len(block) > 6 else None
    lines, event_name = [], b""
    for line in _LINE_END.split(block):
        name, _, value = line.partition(b":")
        if name == b"data":
            lines.append(value.removeprefix(b" "))
        elif name == b"event":
            event_name = value.removeprefix(b" ")
    data = b"\n".join(lines)
    return Event(data, last, event_name) if data.strip() else None


def _is_whole(data: bytes) -> bool:
    """Whether the data of an unterminated event is complete: a server may end its stream without a blank line."""
    return data.strip() == DONE or isinstance(_decoded(data), dict)


def _decoded(data: bytes) -> Any:
    """The JSON value; None if the data is not valid JSON."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _read_event(event: Event, response: StreamedResponse, chunks: list[_Chunk]) -> None:
    if event.name not in _DEFAULT_NAMES:
        message = _decoded(event.data)
        if event.name == b"error":
            response.error = error_message(event.data) or "an error event without a message"
        elif isinstance(message, dict):  # some servers name the events of their chunks
            _read_message(message, event.last, response, chunks)
        return
    message = msgspec.json.decode(event.data)
    if message is None or message == "":
        return
    if not isinstance(message, dict):
        raise TypeError("not an object")
    _read_message(message, event.last, response, chunks)


def _read_message(message: dict[str, Any], place: int, response: StreamedResponse, chunks: list[_Chunk]) -> None:
    error = message.get("error")
    if error or message.get("object") == "error" or ("detail" in message and "choices" not in message):
        text = error.get("message") if isinstance(error, dict) else error
        response.error = _shortened(str(text or error or message.get("message") or message.get("detail") or "an error"))
        return
    usage = message.get("usage")
    if usage:
        if usage.get("prompt_tokens") is not None:
            response.prompt_tokens = _count(usage["prompt_tokens"])
        response.completion_tokens = _count(usage.get("completion_tokens") or 0)
        response.cached_tokens = _count((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    choices = message.get("choices")
    for choice in choices or []:
        chunk = _read_choice(choice, place)
        finish = choice.get("finish_reason")
        if finish in _FAILED:
            response.error = f"the server ended the response with the finish reason {finish!r}"
            return
        if finish:
            response.ended, response.finish = True, str(finish)
        if chunk is not None:
            chunks.append(chunk)
    if usage and not choices:
        response.ended = True


def _count(value: Any) -> int:
    """A token count; raises ValueError if it is out of range."""
    number = int(value)
    if not 0 <= number < _MOST_TOKENS:
        raise ValueError(f"{value} tokens")
    return number


def _read_choice(choice: dict[str, Any], place: int) -> _Chunk | None:
    delta = choice.get("delta")
    tokens = _named_tokens(choice)
    closing = bool(choice.get("finish_reason"))
    if delta is None and "text" not in choice:
        return _Chunk(place, 0, tokens, closing) if tokens or closing else None
    if delta is None:
        weight = _length(choice["text"])
        opening = False
    else:
        weight = sum(_length(delta.get(name)) for name in ("content", "reasoning_content", "reasoning", "refusal"))
        for name in ("tool_calls", "function_call"):
            weight += len(msgspec.json.encode(delta[name])) if delta.get(name) else 0
        opening = "role" in delta and weight == 0  # the first chunk of a chat, without tokens
    if opening and not tokens and not closing:
        return None
    return _Chunk(place, weight, tokens, closing)


def _length(text: Any) -> int:
    """The number of characters of a text, or of a list of parts."""
    if isinstance(text, list):
        return sum(_length(part.get("text") or part.get("thinking")) for part in text)
    if text is not None and not isinstance(text, str):
        raise TypeError("not a text")
    return len(text or "")


def _named_tokens(choice: dict[str, Any]) -> int | None:
    """The number of tokens if the chunk lists them, in logprobs or token_ids."""
    logprobs = choice.get("logprobs")
    for named in (logprobs.get("tokens"), logprobs.get("content")) if logprobs else ():
        if named is not None:
            return len(named)
    if choice.get("token_ids") is not None:
        return len(choice["token_ids"])
    return None


def _page_title(body: bytes) -> str:
    """The title of an HTML page, "" for anything else."""
    match = _TITLE.search(body[:65536])
    return _excerpt(match[1]) if match else ""


def _excerpt(data: bytes) -> str:
    return _shortened(" ".join(data[:4096].decode("utf-8", "replace").split()))


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + " …"


def _count_tokens(chunks: list[_Chunk], response: StreamedResponse, requested: int | None) -> None:
    """Assign tokens to the chunks: as they name them, else so that they sum to the server's usage.

    An empty text after the first text may be a token (a part of a character) or only carry the finish reason; the total
    decides. An empty text before the first one only opens the stream, unless the chunk names tokens.
    """
    texts = [c for c in chunks if c.weight]
    if texts:
        first = next(i for i, c in enumerate(chunks) if c.weight or c.tokens)
        chunks = chunks[first:]
    without_closing = [c for c in chunks if c.weight or not c.closing]
    total = response.completion_tokens
    if total is None and response.finish == "length" and requested is not None and requested >= len(texts):
        total = requested
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
            response.places.append(chunk.place)
            response.tokens.append(count)
