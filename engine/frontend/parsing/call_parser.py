"""Finds tool calls in a text. How one kind of call is written is a `CallFormat`; the rest of the text is content.

A call begins at a marker. What follows is read by a `CallReader`, which holds the text back until it knows that it is a
call. If it is none, the marker is content, and the search continues right after it: malformed calls are text.
"""

from collections.abc import Callable
from typing import Protocol

from engine.frontend.parsing.events import Content, Event


class CallReader(Protocol):
    """Reads what follows one marker: a call, or several."""

    done: bool  # nothing more belongs to it
    failed: bool  # it is no call after all; nothing was reported
    end: int  # the place after the last complete call

    def read(self, text: str, *, final: bool) -> list[Event]:
        """Read on; returns the events of calls.

        Args:
            text: the whole text around the marker; what was read before has not changed.
            final: whether the text is complete. The reader is done then, or has failed.
        """
        ...


class CallFormat(Protocol):
    """How a family of models writes calls."""

    @property
    def markers(self) -> tuple[str, ...]:
        """A call may begin at each of these texts."""
        ...

    @property
    def leading(self) -> tuple[str, ...]:
        """A call may begin at these if nothing but spaces is before; they are a part of the call."""
        ...

    @property
    def special(self) -> tuple[str, ...]:
        """All texts that may be special tokens of a vocabulary."""
        ...

    def reader(self, marker: str, begin: int) -> CallReader:
        """The reader of the text from `begin` on: after the marker, or at a leading text."""
        ...


class StateReader:
    """A `CallReader` of one call or list that is read in states; `_complete` tells that it may end here.

    A state reads on from `_at`, adds events, and returns False if it needs more text.
    """

    def __init__(self, begin: int, state: Callable[[str, list[Event]], bool]):
        self.done = self.failed = False
        self.end = begin
        self._at = begin
        self._complete = False
        self._state = state

    def read(self, text: str, *, final: bool) -> list[Event]:
        events: list[Event] = []
        while not (self.done or self.failed) and self._state(text, events):
            pass
        if final and not self.failed:
            self.done = self._complete
            self.failed = not self.done
        return events

    def _read_closing(self, text: str, at: int, close: str) -> bool:
        """The last state: a closing text at `at` belongs to the call, but may be missing."""
        if text.startswith(close, at):
            self.end = at + len(close)
        elif close.startswith(text[at : at + len(close)]):
            return False
        self.done = True
        return True


class CallParser:
    """An `AnswerParser` for one format of calls.

    Spaces around calls belong to the calls.
    """

    def __init__(self, call_format: CallFormat):
        self._format = call_format
        self._longest = max(map(len, (*call_format.markers, *call_format.leading)), default=0)
        self._text = ""  # not reported yet
        self._reader: CallReader | None = None
        self._resume = 0  # where the search continues if that is no call
        self._empty = True  # whether all text so far is spaces, so that a leading text may follow
        self._after_call = False  # whether a call was the last that was reported

    def feed(self, text: str) -> list[Event]:
        self._text += text
        return self._advance(final=False)

    def finish(self) -> list[Event]:
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> list[Event]:
        events: list[Event] = []
        while self._text:
            if self._reader is None and not self._find_marker(events, final=final):
                break
            assert self._reader is not None
            found = self._reader.read(self._text, final=final)
            events += found
            if found:
                self._empty, self._after_call = False, True
            if self._reader.done:
                self._text = self._text[self._reader.end :]
            elif self._reader.failed:
                self._report(events, self._resume)
            else:
                break
            self._reader = None
        return events

    def _find_marker(self, events: list[Event], *, final: bool) -> bool:
        """Report the content before the next marker and begin to read after it; False if there is no whole marker."""
        text = self._text
        if self._empty:
            spaces = len(text) - len(text.lstrip())
            for leading in self._format.leading:
                if text.startswith(leading, spaces):
                    self._start(leading, spaces, spaces)
                    return True
            if not final and any(leading.startswith(text[spaces:]) for leading in self._format.leading):
                return False
        found = [(at, marker) for marker in self._format.markers if (at := text.find(marker)) >= 0]
        if found:
            at = min(place for place, _ in found)
            marker = max((marker for place, marker in found if place == at), key=len)
            shown = len(text[:at].rstrip())
            self._report(events, shown)
            self._start(marker, at - shown, at - shown + len(marker))
            return True
        kept = 0 if final else self._open_end(text)
        shown = len(text) - kept
        if not final or self._after_call:  # spaces before a call that may follow, or after the last one
            shown = len(text[:shown].rstrip())
        self._report(events, shown)
        if final:
            self._text = ""
        return False

    def _start(self, marker: str, at: int, begin: int) -> None:
        self._reader = self._format.reader(marker, begin)
        # A leading text has no other chance: it is content, with all that follows.
        self._resume = max(begin, at + len(marker))

    def _report(self, events: list[Event], length: int) -> None:
        """Report the next characters as content."""
        if length:
            shown, self._text = self._text[:length], self._text[length:]
            events.append(Content(shown))
            self._empty = self._empty and shown.isspace()
            self._after_call = False

    def _open_end(self, text: str) -> int:
        """The length of the longest end of the text that may be the beginning of a marker."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(marker.startswith(end) for marker in self._format.markers):
                return length
        return 0
