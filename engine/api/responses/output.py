"""The output of a response: items, made from the deltas of a message; each change is an event."""

from collections.abc import Callable
from typing import Any

from engine.api.chat_answers import DeltaReader
from engine.api.reasoning_tokens import ReasoningTokens
from engine.api.responses.conversation import Item, new_id
from engine.frontend.streams import Delta, TokenLogprob

Event = dict[str, Any]
ShowLogprobs = Callable[[list[TokenLogprob]], list[Item]]
MESSAGE, REASONING, CALL = "message", "reasoning", "function_call"
# Names of the events and of the part, by type of item.
TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    MESSAGE: ("response.output_text", {"type": "output_text", "annotations": [], "logprobs": []}),
    REASONING: ("response.reasoning_text", {"type": "reasoning_text"}),
}
ARGUMENTS = "response.function_call_arguments"


class OutputItems:
    """Reads one output. Whatever its deltas are, the items are the same, and what is streamed adds up to them.

    Attributes:
        items: those that are complete.
        finish_reason: of the core, once the output has ended.
        num_tokens: of all output.
    """

    def __init__(
        self, reader: DeltaReader | None, reasoning: ReasoningTokens | None = None, show: ShowLogprobs | None = None
    ):
        """Args:
        reader: of the message; None: the output is the text of one message.
        reasoning: counts the tokens of reasoning.
        show: writes logprobs of tokens; None: texts have none.
        """
        self._reader = reader
        self._reasoning = reasoning
        self._show = show
        self.items: list[Item] = []
        self.finish_reason: str | None = None
        self.num_tokens = 0
        self._open: Item | None = None
        self._texts: list[str] = []  # of the open item: its text or its arguments
        self._logprobs: list[Item] = []  # of the open message
        self._scored: list[TokenLogprob] = []  # tokens whose text is not in an item yet

    def add(self, delta: Delta) -> list[Event]:
        """Add a delta; returns the events, without sequence numbers."""
        final = delta.finish_reason is not None
        if self._show is not None:
            self._scored += delta.logprobs or ()
        events: list[Event] = []
        if self._reader is not None:
            for part in self._reader.read(delta.text, final=final):
                self._add_part(part, events)
        elif delta.text:
            self._add_text(MESSAGE, delta.text, events)
        self.num_tokens += len(delta.token_ids)
        if self._reasoning is not None:
            self._reasoning.add(delta)
        if final:
            self.finish_reason = delta.finish_reason
            if self._open is None and not self.items:
                self._begin(MESSAGE, events)  # so that every response has a text or a call
            self._close(events, "completed" if delta.finish_reason == "stop" else "incomplete")
        return events

    def num_reasoning_tokens(self) -> int:
        """The tokens of reasoning, once the output has ended."""
        return 0 if self._reasoning is None else self._reasoning.finish()

    def _add_part(self, part: dict[str, Any], events: list[Event]) -> None:
        """A delta of a chat's message."""
        if "tool_calls" in part:
            [call] = part["tool_calls"]
            function = call["function"]
            if "id" in call:
                self._close(events)
                self._begin(CALL, events, call_id=call["id"], name=function["name"], arguments="")
            if function["arguments"]:
                self._append(ARGUMENTS, function["arguments"], events)
            self._scored.clear()
        elif "reasoning_content" in part:
            self._add_text(REASONING, part["reasoning_content"], events)
            self._scored.clear()
        else:
            self._add_text(MESSAGE, part["content"], events)

    def _add_text(self, kind: str, text: str, events: list[Event]) -> None:
        if self._open is None or self._open["type"] != kind:
            self._close(events)
            self._begin(kind, events)
        self._append(TEXTS[kind][0], text, events)

    def _event(self, kind: str, *, in_part: bool = False, **fields: Any) -> Event:
        """An event about the open item."""
        assert self._open is not None
        place: dict[str, Any] = {"output_index": len(self.items)}
        if "item" not in fields:
            place["item_id"] = self._open["id"]
        if in_part:
            place["content_index"] = 0
        return {"type": kind} | place | fields

    def _begin(self, kind: str, events: list[Event], **fields: Any) -> None:
        own: dict[str, Any] = {"content": []}
        if kind == MESSAGE:
            own |= {"role": "assistant"}
        elif kind == REASONING:
            own |= {"summary": []}
        else:
            own = fields
        prefix = {MESSAGE: "msg", REASONING: "rs", CALL: "fc"}[kind]
        self._open = {"id": new_id(prefix), "type": kind, "status": "in_progress"} | own
        self._texts, self._logprobs = [], []
        events.append(self._event("response.output_item.added", item=self._open))
        if kind != CALL:
            part = TEXTS[kind][1] | {"text": ""}
            events.append(self._event("response.content_part.added", in_part=True, part=part))

    def _append(self, name: str, text: str, events: list[Event]) -> None:
        event = self._event(f"{name}.delta", in_part=name != ARGUMENTS, delta=text)
        if name == TEXTS[MESSAGE][0]:
            event["logprobs"] = shown = self._take_logprobs(text)
            self._logprobs += shown
        self._texts.append(text)
        events.append(event)

    def _take_logprobs(self, text: str) -> list[Item]:
        """The logprobs of the tokens of the next text of a message."""
        if self._show is None or not self._scored:
            return []
        shown = self._show(self._scored)
        self._scored = []
        if self._texts:
            return shown
        # Before the first text of a message there may be tokens of other parts, such as the tag after the reasoning.
        first, left = len(shown), len(text.encode())
        while first and left > 0:
            first -= 1
            left -= len(shown[first]["bytes"])
        return shown[first:]

    def _close(self, events: list[Event], status: str = "completed") -> None:
        if self._open is None:
            return
        kind, text = self._open["type"], "".join(self._texts)
        item = self._open | {"status": status}
        if kind == CALL:
            item["arguments"] = text
            events.append(self._event(f"{ARGUMENTS}.done", name=item["name"], arguments=text))
        else:
            name, part = TEXTS[kind]
            scored = {"logprobs": self._logprobs} if kind == MESSAGE else {}
            part = part | {"text": text} | scored
            item["content"] = [part]
            done = self._event(f"{name}.done", in_part=True, text=text)
            events.append(done | scored)
            events.append(self._event("response.content_part.done", in_part=True, part=part))
        events.append(self._event("response.output_item.done", item=item))
        self.items.append(item)
        self._open = None
