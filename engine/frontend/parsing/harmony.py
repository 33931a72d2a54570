"""The format of gpt-oss (harmony): an answer is several messages, each with a header that names its channel.

<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…

- `analysis` is reasoning, `final` is content, `commentary` is content too.
- A message to `functions.NAME` is a call: `<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}`.
- `<|call|>` and `<|return|>` end the output, so they are usually missing.
"""

import re
from collections.abc import Callable

from engine.frontend.parsing.call_ids import new_id
from engine.frontend.parsing.events import Arguments, CallBegin, CallEnd, Content, Event, Reasoning
from engine.frontend.parsing.json_calls import UNREADABLE, object_text

BEGIN, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
MARKS = (BEGIN, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)
HEADER_BEGINS = (BEGIN, CHANNEL, MESSAGE, "to=")
BODY_ENDS = (END, CALL, RETURN, BEGIN, CHANNEL)
LONGEST_END = max(map(len, BODY_ENDS))
LONGEST_HEADER = 512
CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(\w+)")
RECIPIENT = re.compile(r"to=([^\s<]+)")
FUNCTIONS = "functions."
# The header of a message with reasoning, up to its text.
REASONING_HEADER = r"<\|channel\|>\s*analysis\b(?:(?!<\|channel\|>|<\|message\|>).)*<\|message\|>"


class HarmonyParser:
    """An `AnswerParser`."""

    def __init__(self, prompt: str, *, calls: bool, reasoning: bool):
        """Args:
        prompt: its end, which may be in the middle of a message that is to be continued.
        calls: report calls; otherwise they are content.
        reasoning: report reasoning; otherwise it is content.
        """
        self._calls = calls
        self._reasoning = reasoning
        self._text = ""  # not reported yet
        self._function = ""  # that the message calls
        self._thinks = False  # whether the message is reasoning
        self._state: Callable[[list[Event], bool], bool] = self._read_header
        _, begun, last = prompt.rpartition(BEGIN)
        if END not in last and (MESSAGE in last or not begun):
            self._open(last.partition(MESSAGE)[0] if MESSAGE in last else "")

    def feed(self, text: str) -> list[Event]:
        return self._advance(text, final=False)

    def finish(self) -> list[Event]:
        return self._advance("", final=True)

    @property
    def held(self) -> int:
        return len(self._text)

    @property
    def reasons(self) -> bool:
        """Whether the message that began last is reasoning."""
        return self._thinks

    def _advance(self, text: str, *, final: bool) -> list[Event]:
        self._text += text
        events: list[Event] = []
        while self._text and self._state(events, final):
            pass
        return events

    # Each state returns whether the next one can go on.

    def _read_header(self, events: list[Event], final: bool) -> bool:
        text = self._text.lstrip()
        begin = next((one for one in HEADER_BEGINS if text.startswith(one)), "")
        if not begin:
            if not final and any(one.startswith(text) for one in HEADER_BEGINS):
                return False
            self._open("")  # a model that does not keep to the format
            return True
        at = text.find(MESSAGE)
        if 0 <= at <= LONGEST_HEADER:
            self._open(text[:at])
            self._text = text[at + len(MESSAGE) :]
            return True
        if len(text) >= LONGEST_HEADER + len(MESSAGE):
            self._open("")
            self._report(events, begin)
            self._text = text[len(begin) :]
            return True
        if final:
            self._text = ""
        return False

    def _open(self, header: str) -> None:
        """Begin a message with this header; an empty one is that of content."""
        channels, recipients = CHANNEL_NAME.findall(header), RECIPIENT.findall(header)
        recipient = recipients[-1] if recipients else ""
        calls = self._calls and recipient.startswith(FUNCTIONS)
        self._function = recipient.removeprefix(FUNCTIONS) if calls else ""
        self._thinks = self._reasoning and channels[-1:] == ["analysis"]
        self._state = self._read_call if self._function else self._read_text

    def _read_text(self, events: list[Event], final: bool) -> bool:
        at = self._find_end()
        if at >= 0:
            self._report(events, self._text[:at])
            self._close(at)
            return True
        shown = len(self._text) - (0 if final else self._open_end())
        self._report(events, self._text[:shown])
        self._text = self._text[shown:]
        return False

    def _read_call(self, events: list[Event], final: bool) -> bool:
        at = self._find_end()
        if at < 0 and not final:
            return False
        at = at if at >= 0 else len(self._text)
        body = self._text[:at]
        try:
            arguments = object_text(body.strip())
        except UNREADABLE:
            self._report(events, body)
        else:
            events += [CallBegin(new_id(), self._function), Arguments(arguments), CallEnd()]
        self._close(at)
        return True

    def _find_end(self) -> int:
        return min((at for one in BODY_ENDS if (at := self._text.find(one)) >= 0), default=-1)

    def _close(self, at: int) -> None:
        """End the message; a mark that begins the next one is kept."""
        ended = next((len(one) for one in (END, CALL, RETURN) if self._text.startswith(one, at)), 0)
        self._text = self._text[at + ended :]
        self._state = self._read_header

    def _report(self, events: list[Event], text: str) -> None:
        if text:
            events.append(Reasoning(text) if self._thinks else Content(text))

    def _open_end(self) -> int:
        """The length of the longest end of the text that may be the beginning of a mark."""
        for length in range(min(LONGEST_END - 1, len(self._text)), 0, -1):
            end = self._text[len(self._text) - length :]
            if any(one.startswith(end) for one in BODY_ENDS):
                return length
        return 0
