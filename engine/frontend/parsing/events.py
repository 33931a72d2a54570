"""What parsers of answers report, in the order of the text."""

from collections.abc import Iterable
from typing import Protocol

import msgspec


class Content(msgspec.Struct, frozen=True):
    text: str


class Reasoning(msgspec.Struct, frozen=True):
    text: str


class CallBegin(msgspec.Struct, frozen=True):
    id: str
    name: str


class Arguments(msgspec.Struct, frozen=True):
    """A part of the arguments of the call that began last. All parts together are a JSON object."""

    text: str


class CallEnd(msgspec.Struct, frozen=True):
    """The call is complete."""


Event = Content | Reasoning | CallBegin | Arguments | CallEnd


class AnswerParser(Protocol):
    """Reads one answer. What it reports does not depend on how the text is divided, and no text makes it fail."""

    def feed(self, text: str) -> list[Event]:
        """Add text; returns what is certain now."""
        ...

    def finish(self) -> list[Event]:
        """The text is complete; returns the rest."""
        ...


class HoldingParser(AnswerParser, Protocol):
    """A parser that knows how much of the text is not reported yet."""

    @property
    def held(self) -> int:
        """The characters at the end of the text that are not reported yet."""
        ...


class PlainText:
    """The parser of answers without tool calls: all text is content."""

    def feed(self, text: str) -> list[Event]:
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        return []

    @property
    def held(self) -> int:
        return 0


class ParsedCall(msgspec.Struct):
    """A tool call."""

    id: str
    name: str
    arguments: str = ""  # JSON


class ParsedAnswer(msgspec.Struct):
    """An answer, collected from events."""

    content: str = ""
    reasoning: str = ""
    calls: list[ParsedCall] = msgspec.field(default_factory=list)

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Content):
                self.content += event.text
            elif isinstance(event, Reasoning):
                self.reasoning += event.text
            elif isinstance(event, CallBegin):
                self.calls.append(ParsedCall(event.id, event.name))
            elif isinstance(event, Arguments):
                self.calls[-1].arguments += event.text


def parse_answer(parser: AnswerParser, text: str) -> ParsedAnswer:
    """The parts of a whole text."""
    answer = ParsedAnswer()
    answer.add(parser.feed(text))
    answer.add(parser.finish())
    return answer
