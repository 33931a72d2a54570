"""Calls whose output is constrained to JSON: what arrives is certain, so arguments are reported as they arrive."""

import msgspec

from engine.frontend.parsing.call_ids import NewId, new_id
from engine.frontend.parsing.events import Arguments, CallBegin, CallEnd, Event
from engine.frontend.parsing.json_reader import JsonReader


class EnforcedCall:
    """An `AnswerParser` of an output that is the arguments of one tool."""

    def __init__(self, name: str, ids: NewId = new_id):
        self._name = name
        self._ids = ids
        self._begun = False

    def feed(self, text: str) -> list[Event]:
        if not self._begun:
            text = text.lstrip()
        if not text:
            return []
        events: list[Event] = [] if self._begun else [CallBegin(self._ids(), self._name)]
        self._begun = True
        return [*events, Arguments(text)]

    def finish(self) -> list[Event]:
        return [CallEnd()] if self._begun else []


class EnforcedCalls:
    """An `AnswerParser` of an output that is a list of objects, each with the name of a tool and then its arguments."""

    def __init__(self, ids: NewId = new_id):
        self._ids = ids
        self._text = ""
        self._at = 0  # all before it has been read
        self._object: JsonReader | None = None
        self._reported = -1  # the end of the arguments reported so far; -1: the call has not begun

    def feed(self, text: str) -> list[Event]:
        self._text += text
        events: list[Event] = []
        while self._read_object(events):
            pass
        return events

    def finish(self) -> list[Event]:
        return [CallEnd()] if self._reported >= 0 else []

    def _read_object(self, events: list[Event]) -> bool:
        """Read one object of the list; False if it is not complete."""
        if self._object is None:
            begin = self._text.find("{", self._at)
            self._at = len(self._text) if begin < 0 else begin
            if begin < 0:
                return False
            self._object = JsonReader(begin)
        reader = self._object
        reader.read(self._text)
        if self._reported < 0 and len(reader.members) == 2:
            name = reader.members[0]
            events.append(CallBegin(self._ids(), msgspec.json.decode(self._text[name.begin : name.end], type=str)))
            self._reported = reader.members[1].begin
        if self._reported >= 0:
            arguments = reader.members[1]
            end = arguments.end if arguments.end >= 0 else reader.at
            if end > self._reported:
                events.append(Arguments(self._text[self._reported : end]))
                self._reported = end
        if not reader.done:
            return False
        events.append(CallEnd())
        self._at, self._object, self._reported = reader.at, None, -1
        return True
