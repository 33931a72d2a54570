"""Mistral's calls: `[TOOL_CALLS]` with a list of objects, or with a name, `[ARGS]` and the arguments."""

import re

from engine.frontend.parsing.call_ids import new_mistral_id
from engine.frontend.parsing.call_parser import CallReader
from engine.frontend.parsing.events import Arguments, CallBegin, CallEnd, Event
from engine.frontend.parsing.json_calls import UNREADABLE, JsonCalls, object_text
from engine.frontend.parsing.json_reader import JsonReader

MARKER, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
# The model's own id is not used: it may repeat one of the conversation.
HEAD = re.compile(r"\s*(?P<name>[A-Za-z0-9_.-]{1,256})\s*(\[CALL_ID\]\w{1,64}\s*)?(\[ARGS\]\s*)?(?P<begin>\{)")
LONGEST_HEAD = 512
HEAD_CHARACTERS = re.compile(r"[\s\w.\-\[\]]*")


class MistralFormat:
    """A `CallFormat`."""

    markers = (MARKER,)
    leading = ()
    special = (MARKER, CALL_ID, ARGS)

    def reader(self, marker: str, begin: int) -> CallReader:  # noqa: ARG002  (there is one)
        return MistralCalls(begin)


class MistralCalls:
    """Reads what follows one marker."""

    def __init__(self, begin: int):
        self.done = self.failed = False
        self.end = begin
        self._begin = begin
        self._objects: JsonCalls | None = None
        self._name = ""
        self._arguments: JsonReader | None = None
        self._from = begin  # where the arguments begin

    def read(self, text: str, *, final: bool) -> list[Event]:
        if self._objects is None and self._arguments is None:
            self._read_head(text)
        events: list[Event] = []
        if self._objects is not None:
            events = self._objects.read(text, final=final)
            self.done, self.failed, self.end = self._objects.done, self._objects.failed, self._objects.end
        elif self._arguments is not None and self._arguments.read(text):
            events = self._call(text)
        self.failed = self.failed or (final and not self.done)
        return events

    def _read_head(self, text: str) -> None:
        rest = text[self._begin :].lstrip()
        if rest[:1] in ("[", "{"):
            self._objects = JsonCalls(self._begin, "", None, new_mistral_id)
        elif (match := HEAD.match(text, self._begin)) and match.start("begin") - self._begin <= LONGEST_HEAD:
            self._name, self._from = match["name"], match.start("begin")
            self._arguments = JsonReader(self._from)
        elif rest:
            head = HEAD_CHARACTERS.match(text, self._begin)
            assert head is not None
            self.failed = head.end() < len(text) or len(text) - self._begin > LONGEST_HEAD

    def _call(self, text: str) -> list[Event]:
        assert self._arguments is not None
        try:
            arguments = object_text(text[self._from : self._arguments.at]) if self._arguments.done else None
        except UNREADABLE:
            arguments = None
        if arguments is None:
            self.failed = True
            return []
        self.done, self.end = True, self._arguments.at
        return [CallBegin(new_mistral_id(), self._name), Arguments(arguments), CallEnd()]
