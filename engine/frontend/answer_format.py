"""How a model writes reasoning and tool calls: chosen by its chat template, or by name."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from engine.errors import ConfigError
from engine.frontend.parsing import harmony, python_calls, xml_calls
from engine.frontend.parsing.call_ids import new_id, new_mistral_id
from engine.frontend.parsing.call_parser import CallFormat, CallParser
from engine.frontend.parsing.enforced_calls import EnforcedCall, EnforcedCalls
from engine.frontend.parsing.events import AnswerParser, HoldingParser, PlainText
from engine.frontend.parsing.json_calls import JsonFormat
from engine.frontend.parsing.mistral_calls import MARKER, MistralFormat
from engine.frontend.parsing.names import AUTO, NONE, REASONING_PARSERS, TOOL_PARSERS
from engine.frontend.parsing.reasoning import ReasoningParser, Tags
from engine.frontend.tokenizer import Tokenizer
from engine.reasoning import ReasoningMarks

THINK, MISTRAL_THINK = Tags("<think>", "</think>"), Tags("[THINK]", "[/THINK]")
TAGS = {"deepseek_r1": THINK, "qwen3": THINK, "mistral": MISTRAL_THINK}
HARMONY_CALLS, HARMONY_REASONING = "openai", "openai_gptoss"
PYTHON_TAG = "<|python_tag|>"
TAIL_CHARACTERS, TAIL_TOKENS = 256, 32  # of the prompt, which may begin the reasoning
# Texts in templates that identify the format. The first that occurs counts.
TOOL_MARKS = (
    (harmony.CHANNEL, HARMONY_CALLS),
    (xml_calls.FUNCTION, "qwen3_coder"),
    ("<arg_key>", NONE),  # GLM's form, which has no parser
    (xml_calls.OPEN, "hermes"),
    (MARKER, "mistral"),
    (python_calls.START, "pythonic"),
    ("[func_name1(", "pythonic"),
    (PYTHON_TAG, "llama3_json"),
    ('"parameters": dictionary of argument name', "llama3_json"),
)
REASONING_MARKS = ((harmony.CHANNEL, HARMONY_REASONING), ("</think>", "qwen3"), ("[/THINK]", "mistral"))

Schemas = Mapping[str, dict[str, Any]]


class AnswerFormat:
    """The parsers of one server."""

    def __init__(self, tokenizer: Tokenizer, tools: str = AUTO, reasoning: str = AUTO):
        """Choose the parsers; `tools` and `reasoning` are names, auto or none. Raises ConfigError if unknown."""
        source = tokenizer.chat_source
        self.tools = _choose(tools, TOOL_PARSERS, TOOL_MARKS, source, "--tool-call-parser")
        if tools == AUTO and self.tools == NONE and source and not tokenizer.takes_tools:
            self.tools = "hermes"  # the form of `engine.frontend.tool_messages`
        self.reasoning = _choose(reasoning, REASONING_PARSERS, REASONING_MARKS, source, "--reasoning-parser")
        self._tags = TAGS.get(self.reasoning)
        self._harmony = self.tools == HARMONY_CALLS or self.reasoning == HARMONY_REASONING
        special = [*(self._tags or ()), *(harmony.MARKS if self._harmony else ())]
        if (form := self._call_format({})) is not None:
            special += form.special
        ids = (tokenizer.backend.id_of(text) for text in special)
        # Tokens that parsers need in the text, although clients do not see them.
        self.visible_ids = tuple(sorted(tokenizer.special_ids.intersection(one for one in ids if one is not None)))

    def parses(self, *, tools: bool, reasoning: bool) -> bool:
        """Whether an answer is anything but plain content, if it may have tool calls or reasoning."""
        return self._harmony or (tools and self.tools != NONE) or (reasoning and self._tags is not None)

    def parser(self, prompt: str, tools: Schemas, *, reasoning: bool) -> AnswerParser:
        """A parser for one answer.

        Args:
            prompt: the end of the prompt as text, which may begin the reasoning.
            tools: schemas of the parameters of the tools that may be called, by name; empty: calls are not parsed.
            reasoning: separate it from the content.
        """
        if self._harmony:
            separate = reasoning and self.reasoning == HARMONY_REASONING
            return harmony.HarmonyParser(prompt, calls=bool(tools), reasoning=separate)
        form = self._call_format(tools) if tools else None
        parser: AnswerParser = PlainText() if form is None else CallParser(form)
        if self._tags is None or not reasoning:
            return parser
        return self._reasoning_parser(self._tags, prompt, parser)

    def _reasoning_parser(self, tags: Tags, prompt: str, rest: AnswerParser) -> ReasoningParser:
        return ReasoningParser(tags, rest, opened=self.begins_with_reasoning(prompt))

    def begins_with_reasoning(self, prompt: str) -> bool:
        """Whether an output after this end of a prompt begins within reasoning."""
        if self.reasoning == HARMONY_REASONING:
            return harmony.HarmonyParser(prompt, calls=False, reasoning=True).reasons
        if self._tags is None:
            return False
        always = self.reasoning == "deepseek_r1" and not self._tags.is_closed(prompt)
        return always or self._tags.is_open(prompt)

    @property
    def reasoning_marks(self) -> ReasoningMarks | None:
        """The texts around reasoning; None if the model's form of it is unknown."""
        if self.reasoning == HARMONY_REASONING:
            return ReasoningMarks(harmony.REASONING_HEADER, harmony.BODY_ENDS, repeats=True)
        if self._tags is None:
            return None
        return ReasoningMarks(rf"\A\s*{re.escape(self._tags.begin)}", (self._tags.end,))

    @property
    def reasons_once(self) -> bool:
        """Whether reasoning stands before everything else only."""
        return not self._harmony

    def reasoning_only(self, prompt: str) -> HoldingParser | None:
        """A parser that tells apart only the reasoning; None if the model's form of it is unknown."""
        if self.reasoning == HARMONY_REASONING:
            return harmony.HarmonyParser(prompt, calls=False, reasoning=True)
        return None if self._tags is None else self._reasoning_parser(self._tags, prompt, PlainText())

    def enforced_parser(self, named: str) -> AnswerParser:
        """A parser for an output that is constrained to calls; `named`: of this tool, else of any."""
        ids = new_mistral_id if self.tools == "mistral" else new_id
        return EnforcedCall(named, ids) if named else EnforcedCalls(ids)

    def _call_format(self, tools: Schemas) -> CallFormat | None:
        if self.tools == "hermes":
            return JsonFormat(markers=("<tool_call>",), close="</tool_call>")
        if self.tools == "llama3_json":
            return JsonFormat(markers=(PYTHON_TAG,), names=tools)
        if self.tools == "mistral":
            return MistralFormat()
        if self.tools == "qwen3_coder":
            return xml_calls.XmlFormat(tools)
        if self.tools == "pythonic":
            return python_calls.PythonFormat(tools)
        return None


def _choose(name: str, known: Collection[str], marks: Collection[tuple[str, str]], template: str, flag: str) -> str:
    if name == AUTO:
        return next((found for mark, found in marks if mark in template), NONE)
    if name not in known and name != NONE:
        raise ConfigError(f"{flag} must be {', '.join((AUTO, NONE, *known))}, not {name!r}")
    return name


def prompt_end(tokenizer: Tokenizer, prompt: str | list[int]) -> str:
    """The end of a prompt as text, with special tokens."""
    if isinstance(prompt, str):
        return prompt[-TAIL_CHARACTERS:]
    return tokenizer.decode(prompt[-TAIL_TOKENS:], skip_special_tokens=False)
