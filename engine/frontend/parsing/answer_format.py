"""How a model writes reasoning and tool calls: chosen by its chat template, or by name."""

from collections.abc import Collection

from engine.errors import ConfigError
from engine.frontend.parsing.call_parser import CallFormat, CallParser
from engine.frontend.parsing.events import AnswerParser, PlainText
from engine.frontend.parsing.json_calls import JsonFormat
from engine.frontend.parsing.mistral_calls import MARKER, MistralFormat
from engine.frontend.parsing.names import AUTO, NONE, REASONING_PARSERS, TOOL_PARSERS
from engine.frontend.parsing.reasoning import ReasoningParser, Tags
from engine.frontend.tokenizer import Tokenizer

THINK, MISTRAL_THINK = Tags("<think>", "</think>"), Tags("[THINK]", "[/THINK]")
TAGS = {"deepseek_r1": THINK, "qwen3": THINK, "mistral": MISTRAL_THINK}
PYTHON_TAG = "<|python_tag|>"
# Texts in templates that tell the format. The first that occurs counts.
TOOL_MARKS = (
    ("<function=", NONE),  # forms of Qwen 3 Coder and GLM, which have no parser
    ("<arg_key>", NONE),
    ("<tool_call>", "hermes"),
    (MARKER, "mistral"),
    (PYTHON_TAG, "llama3_json"),
    ('"parameters": dictionary of argument name', "llama3_json"),
)
REASONING_MARKS = (("</think>", "qwen3"), ("[/THINK]", "mistral"))


class AnswerFormat:
    """The parsers of one server."""

    def __init__(self, tokenizer: Tokenizer, tools: str = AUTO, reasoning: str = AUTO):
        """Choose the parsers; `tools` and `reasoning` are names, auto or none. Raises ConfigError if unknown."""
        source = tokenizer.chat_source
        self.tools = _choose(tools, TOOL_PARSERS, TOOL_MARKS, source, "--tool-call-parser")
        self.reasoning = _choose(reasoning, REASONING_PARSERS, REASONING_MARKS, source, "--reasoning-parser")
        self._tags = TAGS.get(self.reasoning)
        special = list(self._tags or ())
        if self.tools != NONE:
            special += self._call_format(()).special
        ids = (tokenizer.backend.id_of(text) for text in special)
        # Tokens that parsers need in the text, although clients do not see them.
        self.visible_ids = tuple(sorted(tokenizer.special_ids.intersection(one for one in ids if one is not None)))

    def parser(self, prompt: str, tools: Collection[str], *, reasoning: bool) -> AnswerParser:
        """A parser for one answer.

        Args:
            prompt: the end of the prompt as text, which may begin the reasoning.
            tools: names of the tools that may be called; empty: calls are not parsed.
            reasoning: separate it from the content.
        """
        parser: AnswerParser = CallParser(self._call_format(tools)) if tools else PlainText()
        if self._tags is None or not reasoning:
            return parser
        always = self.reasoning == "deepseek_r1" and not self._tags.is_closed(prompt)
        return ReasoningParser(self._tags, parser, opened=always or self._tags.is_open(prompt))

    def _call_format(self, names: Collection[str]) -> CallFormat:
        if self.tools == "mistral":
            return MistralFormat()
        if self.tools == "llama3_json":
            return JsonFormat(markers=(PYTHON_TAG,), names=names)
        return JsonFormat(markers=("<tool_call>",), close="</tool_call>")


def _choose(name: str, known: Collection[str], marks: Collection[tuple[str, str]], template: str, flag: str) -> str:
    if name == AUTO:
        return next((found for mark, found in marks if mark in template), NONE)
    if name not in known and name != NONE:
        raise ConfigError(f"{flag} must be {', '.join((AUTO, NONE, *known))}, not {name!r}")
    return name
