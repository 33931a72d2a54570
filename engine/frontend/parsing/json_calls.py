"""Calls written as JSON objects: {"name": "f", "arguments": {…}}.

- Hermes, Qwen 2.5 and 3: `<tool_call>{…}</tool_call>`
- Llama 3: `{…}; {…}` as the whole answer, or after `<|python_tag|>`, with the key `parameters`
- Mistral, older models: `[TOOL_CALLS] [{…}, {…}]`
"""

from collections.abc import Callable, Collection

import msgspec

from engine.frontend.parsing.call_ids import NewId, new_id
from engine.frontend.parsing.events import Arguments, CallBegin, CallEnd, Event
from engine.frontend.parsing.json_reader import SPACES, JsonReader, Member

ARGUMENTS = ("arguments", "parameters")
# Keys of a call without a marker. An object with others is an answer in JSON.
KEYS = frozenset({"name", "id", "type", *ARGUMENTS})
UNREADABLE = (ValueError, RecursionError)  # what decoding raises; msgspec's DecodeError is a ValueError

decode = msgspec.json.decode


class JsonFormat:
    """A `CallFormat` of JSON objects."""

    def __init__(
        self,
        *,
        markers: tuple[str, ...] = (),
        close: str = "",
        names: Collection[str] | None = None,
        ids: NewId = new_id,
    ):
        """Args:
        markers: before the calls.
        close: may follow the calls of one marker.
        names: of the tools. If given, an answer that begins with a call of one of them needs no marker.
        ids: makes the ids of calls.
        """
        self.markers = markers
        self.leading = () if names is None else ("{",)
        self.special = (*markers, close) if close else markers
        self._close = close
        self._names = names
        self._ids = ids

    def reader(self, marker: str, begin: int) -> "JsonCalls":
        names = self._names if marker in self.leading else None
        return JsonCalls(begin, self._close, names, self._ids)


class JsonCalls:
    """Reads one object, or several with `;` or `,` between them, or a list; then the closing marker, if any."""

    def __init__(self, begin: int, close: str, names: Collection[str] | None, ids: NewId):
        self.done = self.failed = False
        self.end = begin
        self._at = begin
        self._close = close
        self._make_object = lambda at: JsonCall(at, names, ids)
        self._list = False
        self._object: JsonCall | None = None
        self._complete = 0  # calls
        self._state: Callable[[str, bool, list[Event]], bool] = self._read_start

    def read(self, text: str, *, final: bool) -> list[Event]:
        events: list[Event] = []
        while not (self.done or self.failed) and self._state(text, final, events):
            pass
        if final and not (self.done or self.failed):
            self._give_up()
        return events

    # Each state returns False if it needs more text.

    def _next_character(self, text: str) -> str:
        match = SPACES.match(text, self._at)
        assert match is not None
        self._at = match.end()
        return text[self._at : self._at + 1]

    def _read_start(self, text: str, _final: bool, _events: list[Event]) -> bool:
        character = self._next_character(text)
        if character == "[":
            self._list = True
            self._at += 1
        if character:
            self._state = self._begin_object
        return bool(character)

    def _begin_object(self, text: str, _final: bool, _events: list[Event]) -> bool:
        character = self._next_character(text)
        if character == "{":
            self._object = self._make_object(self._at)
            self._state = self._read_object
        elif character:
            self._give_up()
        return bool(character)

    def _read_object(self, text: str, final: bool, events: list[Event]) -> bool:
        assert self._object is not None
        events += self._object.read(text, final=final)
        if self._object.failed:
            self._give_up()
        elif self._object.done:
            self._complete += 1
            self._at = self.end = self._object.end
            self._state = self._read_separator
        return self._object.done

    def _read_separator(self, text: str, _final: bool, _events: list[Event]) -> bool:
        character = self._next_character(text)
        if self._list and character == "]":
            self._at += 1
            self.end = self._at
            self._state = self._read_close
        elif character == "," or (character == ";" and not self._list):
            self._at += 1
            self._state = self._begin_object
        elif character == "{" and not self._list:
            self._state = self._begin_object
        elif character and self._list:
            self._give_up()
        elif character:
            self._state = self._read_close
        return bool(character)

    def _read_close(self, text: str, _final: bool, _events: list[Event]) -> bool:
        if self._close:
            self._next_character(text)
            if text.startswith(self._close, self._at):
                self.end = self._at + len(self._close)
            elif self._close.startswith(text[self._at :]):
                return False
        self.done = True
        return True

    def _give_up(self) -> None:
        """The text from here on is no call. The calls before it are, if there are any."""
        self.done = self._complete > 0
        self.failed = not self.done


class JsonCall:
    """Reads one object that may be a call."""

    def __init__(self, begin: int, names: Collection[str] | None, ids: NewId):
        """`names`: of the tools, if the object must be a call of one of them."""
        self.done = self.failed = False
        self._begin = begin
        self._names = names
        self._ids = ids
        self._reader = JsonReader(begin)

    @property
    def end(self) -> int:
        return self._reader.at

    def read(self, text: str, *, final: bool) -> list[Event]:
        """Read on; see `CallReader.read`."""
        reader = self._reader
        reader.read(text)
        broken = reader.broken or (self._names is not None and not self._may_be_call(text, self._names))
        events: list[Event] = []
        if reader.done and not broken:
            events = self._call(text)
        self.done = bool(events)
        self.failed = not self.done and (reader.done or broken or final)
        return events

    def _may_be_call(self, text: str, names: Collection[str]) -> bool:
        """Whether the members so far are those of a call."""
        for member in self._reader.members:
            key = _key(text, member)
            if key not in KEYS:
                return False
            if key == "name" and member.end > 0 and text[member.begin + 1 : member.end - 1] not in names:
                return False
        return True

    def _call(self, text: str) -> list[Event]:
        """The call that the object is; empty if it is none."""
        values = {_key(text, member): text[member.begin : member.end] for member in self._reader.members}
        try:
            decode(text[self._begin : self.end])  # fails for a lone surrogate, or if it is nested too deeply
            name = decode(values.get("name", "null"))
            arguments = object_text(next((values[key] for key in ARGUMENTS if key in values), "null"))
        except UNREADABLE:
            return []
        if not isinstance(name, str) or not name:
            return []
        return [CallBegin(self._ids(), name), Arguments(arguments), CallEnd()]


def _key(text: str, member: Member) -> str:
    """The key of a member as it is written; one with escapes is none that a call has."""
    return text[member.key_begin + 1 : member.key_end - 1]


def object_text(raw: str) -> str:
    """The JSON of a call's arguments. Some models write the object as a text. Raises ValueError if it is no object."""
    value = decode(raw)
    if value is None:
        return "{}"
    if isinstance(value, str):
        raw, value = value.strip(), decode(value)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return raw
