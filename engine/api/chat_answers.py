"""Messages of chats whose outputs are parsed: with tool calls, or with reasoning apart from the content."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from engine.api.reasoning_tokens import ReasoningTokens
from engine.api.render import Chunks, usage
from engine.api.tools import ToolChoice
from engine.frontend.answer_format import AnswerFormat, prompt_end
from engine.frontend.detokenizer import Detokenizer
from engine.frontend.parsing.events import (
    AnswerParser,
    Arguments,
    CallBegin,
    Content,
    Event,
    PlainText,
    Reasoning,
    parse_answer,
)
from engine.frontend.prompts import Prompt, Text
from engine.frontend.streams import CollectedOutput, Delta, RequestStream
from engine.frontend.tokenizer import Tokenizer

encode = msgspec.json.encode


class AnswerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the messages of one request contain.

    Attributes:
        choice: the tools that may be called. Without `parallel`, calls after the first are left out.
        separate_reasoning: whether reasoning is separated from the content.
        include_reasoning: whether separated reasoning is shown.
    """

    choice: ToolChoice
    separate_reasoning: bool = True
    include_reasoning: bool = True


class ChatAnswers:
    """Parses the outputs of one request."""

    def __init__(self, answers: AnswerFormat, tokenizer: Tokenizer, prompt: Prompt, options: AnswerOptions):
        self.options = options
        end = prompt_end(tokenizer, prompt.text if isinstance(prompt, Text) else prompt)
        choice = options.choice
        self._answers, self._tokenizer, self._prompt_end = answers, tokenizer, end
        self.new_parser: Callable[[], AnswerParser] = lambda: (
            answers.enforced_parser(choice.named)
            if choice.enforced
            else answers.parser(end, choice.tools, reasoning=options.separate_reasoning)
        )

    def message(self, text: str, echoed: str) -> dict[str, Any]:
        """The message of a whole output; its content begins with `echoed`."""
        answer = parse_answer(self.new_parser(), text)
        calls = answer.calls if self.options.choice.parallel else answer.calls[:1]
        message: dict[str, Any] = {"role": "assistant", "content": echoed + answer.content, "refusal": None}
        if calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = [
                {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": one.arguments}}
                for one in calls
            ]
        if self.options.separate_reasoning and self.options.include_reasoning:
            message["reasoning_content"] = message["reasoning"] = answer.reasoning or None
        return message

    def reasoning_tokens(self, stream: RequestStream) -> ReasoningTokens | None:
        """Counts the reasoning of an output; None if the model's form of it is unknown."""
        parser = self._answers.reasoning_only(self._prompt_end)
        if parser is None:
            return None
        if self.options.choice.enforced:  # such an output has calls only
            parser = PlainText()
        params, [prompt] = stream.params, stream.prompts
        detokenizer = Detokenizer(
            self._tokenizer,
            prompt if isinstance(prompt, list) else (),
            skip_special_tokens=params.skip_special_tokens,
            visible_ids=params.visible_special_ids,
        )
        return ReasoningTokens(
            parser, detokenizer, once=self._answers.reasons_once, shows_stop=params.include_stop_str_in_output
        )

    def count_reasoning(self, stream: RequestStream, outputs: Sequence[CollectedOutput]) -> int | None:
        """The tokens of reasoning in whole outputs; None if the model's form of it is unknown."""
        total = 0
        for output in outputs:
            counter = self.reasoning_tokens(stream)
            if counter is None:
                return None
            counter.add(output)
            total += counter.finish()
        return total

    def chunks(self, *arguments: Any, **options: Any) -> "AnswerChunks":
        """The chunks of a stream; arguments are those of `Chunks`."""
        return AnswerChunks(self, *arguments, **options)

    def reader(self) -> "DeltaReader":
        """Reads an output as it is streamed."""
        return DeltaReader(self.new_parser(), self.options)


def finish_reason(reason: str | None, *, called: bool, named: bool) -> str | None:
    """The `finish_reason` of an output that ended for this reason.

    Args:
        reason: of the core.
        called: whether the message has calls.
        named: whether the request names the tool; then OpenAI's API has "stop".
    """
    return "tool_calls" if called and not named and reason == "stop" else reason


class DeltaReader:
    """Turns the text of one output into the deltas of its message."""

    def __init__(self, parser: AnswerParser, options: AnswerOptions):
        self._parser = parser
        self._most_calls = None if options.choice.parallel else 1
        self._hides_reasoning = not options.include_reasoning
        self.num_calls = 0

    def read(self, text: str, *, final: bool) -> list[dict[str, Any]]:
        """The deltas for the next part of the text: each has content, reasoning, or a part of one call."""
        events = self._parser.feed(text)
        if final:
            events += self._parser.finish()
        deltas: list[dict[str, Any]] = []
        for event in events:
            self._add(event, deltas)
        return deltas

    def _add(self, event: Event, deltas: list[dict[str, Any]]) -> None:
        last = deltas[-1] if deltas else {}
        if isinstance(event, Content | Reasoning):
            name = "content" if isinstance(event, Content) else "reasoning_content"
            if isinstance(event, Reasoning) and self._hides_reasoning:
                return
            if name in last:
                last[name] += event.text
            else:
                deltas.append({name: event.text})
        elif isinstance(event, CallBegin):
            self.num_calls += 1
            if self._shows_call:
                function = {"name": event.name, "arguments": ""}
                call = {"index": self.num_calls - 1, "id": event.id, "type": "function", "function": function}
                deltas.append({"tool_calls": [call]})
        elif isinstance(event, Arguments) and self._shows_call:
            if "tool_calls" in last:
                last["tool_calls"][0]["function"]["arguments"] += event.text
            else:
                deltas.append({"tool_calls": [{"index": self.num_calls - 1, "function": {"arguments": event.text}}]})

    @property
    def _shows_call(self) -> bool:
        return self._most_calls is None or self.num_calls <= self._most_calls


class AnswerChunks(Chunks):
    """Renders the chunks of a chat whose outputs are parsed.

    A part of the text gives as many chunks as it has deltas. It gives none while a call is incomplete, unless it has
    something else to say: logprobs, token ids, usage, or the end.
    """

    def __init__(self, answers: ChatAnswers, *arguments: Any, **options: Any):
        """Further arguments as of `Chunks`."""
        super().__init__(*arguments, **options)
        self._answers = answers
        self._readers: dict[int, DeltaReader] = {}  # by output
        self._begun: set[int] = set()  # outputs that have a chunk
        self._counters: dict[int, ReasoningTokens | None] = {}  # by output

    def render(self, delta: Delta) -> bytes:
        reader = self._readers.get(delta.index)
        if reader is None:
            reader = self._readers[delta.index] = self._answers.reader()
            self._counters[delta.index] = self._answers.reasoning_tokens(self._stream) if self._include_usage else None
        self._tokens += len(delta.token_ids)
        final = delta.finish_reason is not None
        if (counter := self._counters[delta.index]) is not None:
            counter.add(delta)
            if final:
                counter.finish()
        parts = reader.read(delta.text, final=final)
        if not parts and not (final or delta.logprobs or self._token_ids or self._continuous):
            return b""
        named = bool(self._answers.options.choice.named)
        delta.finish_reason = finish_reason(delta.finish_reason, called=reader.num_calls > 0, named=named)
        plain = Delta(delta.index, "", [])
        chunks = [self._chunk(one, plain) for one in parts[:-1]]
        chunks.append(self._chunk(parts[-1] if parts else {}, delta))
        return b"".join(chunks)

    def _usage(self) -> dict[str, Any]:
        counters = [counter for counter in self._counters.values() if counter is not None]
        return usage(self._stream, self._tokens, sum(one.count for one in counters) if counters else None)

    def _chunk(self, part: dict[str, Any], delta: Delta) -> bytes:
        """One chunk: `part` is its delta; the other fields are those of `delta`."""
        about: dict[str, Any] = {}
        if "reasoning_content" in part:
            part = part | {"reasoning": part["reasoning_content"]}  # vLLM's name
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            echoed = "" if self._echo is None else self._echo(delta.index)
            content = echoed + part.get("content", "")
            part = part | {"content": content or (None if "tool_calls" in part else "")}
            part = {"role": "assistant"} | part
            if self._prompts is not None:
                about = self._prompts.fields(delta.index)
        begin = self._head + b',"choices":[{"index":%d,"delta":' % delta.index
        return begin + encode(part)[:-1] + self._rest(delta, None, about)
