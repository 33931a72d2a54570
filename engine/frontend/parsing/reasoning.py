"""Reasoning between two tags, `<think>` and `</think>`, before the answer.

A model's template may write the first tag itself, at the end of the prompt; then the output has only the second.
Line breaks next to the tags belong to the tags, as in the templates that write reasoning back.
"""

from collections.abc import Callable
from typing import NamedTuple

from engine.frontend.parsing.events import AnswerParser, Event, Reasoning


class Tags(NamedTuple):
    begin: str
    end: str

    def is_open(self, prompt: str) -> bool:
        """Whether a prompt ends with the first tag, so that the output begins with reasoning."""
        return prompt.rstrip().endswith(self.begin)

    def is_closed(self, prompt: str) -> bool:
        """Whether a prompt ends with the second tag, so that the model shall not reason."""
        return prompt.rstrip().endswith(self.end)


class ReasoningParser:
    """An `AnswerParser` that passes the text after the reasoning on to another one."""

    def __init__(self, tags: Tags, rest: AnswerParser, *, opened: bool):
        """`opened`: the output begins with reasoning. Otherwise only if it begins with the first tag."""
        self._tags = tags
        self._rest = rest
        self._text = ""  # not reported yet
        self._state: Callable[[list[Event], bool], bool] = self._read_reasoning if opened else self._read_begin
        self._bare = True  # no reasoning was reported yet

    def feed(self, text: str) -> list[Event]:
        return self._advance(text, final=False)

    def finish(self) -> list[Event]:
        return [*self._advance("", final=True), *self._rest.finish()]

    @property
    def held(self) -> int:
        return len(self._text)

    def _advance(self, text: str, *, final: bool) -> list[Event]:
        self._text += text
        events: list[Event] = []
        while self._state(events, final):
            pass
        return events

    # Each state returns whether the next one can go on.

    def _read_begin(self, _events: list[Event], final: bool) -> bool:
        begin, text = self._tags.begin, self._text.lstrip()
        if text.startswith(begin):
            self._text = text[len(begin) :]
            self._state = self._read_reasoning
        elif begin.startswith(text) and not final:
            return False
        else:
            self._state = self._read_rest
        return True

    def _read_reasoning(self, events: list[Event], final: bool) -> bool:
        if self._bare:
            self._text = self._text.lstrip("\n")
        at = self._text.find(self._tags.end)
        if at >= 0:
            self._report(events, self._text[:at].rstrip("\n"))
            self._text = self._text[at + len(self._tags.end) :]
            self._state = self._read_gap
            return True
        kept = 0 if final else self._open_end(self._text)
        shown = self._text[: len(self._text) - kept].rstrip("\n")
        self._report(events, shown)
        self._text = "" if final else self._text[len(shown) :]
        return False

    def _read_gap(self, _events: list[Event], _final: bool) -> bool:
        self._text = self._text.lstrip("\n")
        if not self._text:
            return False
        self._state = self._read_rest
        return True

    def _read_rest(self, events: list[Event], _final: bool) -> bool:
        text, self._text = self._text, ""
        events += self._rest.feed(text)
        return False

    def _report(self, events: list[Event], text: str) -> None:
        if text:
            self._bare = False
            events.append(Reasoning(text))

    def _open_end(self, text: str) -> int:
        """The length of the longest end of the text that may be the beginning of the second tag."""
        end = self._tags.end
        return next((length for length in range(len(end) - 1, 0, -1) if text.endswith(end[:length])), 0)
