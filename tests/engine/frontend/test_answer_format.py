"""Which form of calls and reasoning a server expects, and which special tokens its parsers see."""

import pytest
from tokenizers import AddedToken

from engine.errors import ConfigError
from engine.frontend.answer_format import AnswerFormat, prompt_end
from engine.frontend.chat_template import ChatTemplate
from engine.frontend.detokenizer import Detokenizer
from engine.frontend.parsing.events import AnswerParser, parse_answer
from engine.frontend.parsing.names import NONE, REASONING_PARSERS, TOOL_PARSERS
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.tokenizer_backends import FastBackend, StandInBackend
from tests.engine.frontend import templates
from tests.engine.frontend.conftest import byte_level_library

CALL = '{"name": "f", "arguments": {}}'


def with_template(source: str) -> Tokenizer:
    return Tokenizer(StandInBackend(300), template=ChatTemplate(source, {}))


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ("{{ tools }}<tool_call>", "hermes", NONE),
        ("{{ tools }}<tool_call>\n{...}</think>", "hermes", "qwen3"),
        ("{{ tools }}<tool_call>\n<function=example>", "qwen3_coder", NONE),
        ("{{ tools }}[TOOL_CALLS][/THINK]", "mistral", "mistral"),
        ("{{ tools }}<|python_tag|>", "llama3_json", NONE),
        ('{{ tools }}{"name": function name, "parameters": dictionary of argument name, …}', "llama3_json", NONE),
        ("{{ tools }}<|python_start|>", "pythonic", NONE),
        ("{{ tools }}<|start|><|channel|>", "openai", "openai_gptoss"),
        ("{{ tools }}<arg_key><tool_call>", NONE, NONE),
        ("{{ tools }}", NONE, NONE),
        ("{{ messages }}", "hermes", NONE),  # the tools are described by us
        (templates.QWEN, "hermes", NONE),
    ],
)  # fmt: skip
def test_the_template_tells_the_form(template: str, tools: str, reasoning: str) -> None:
    found = AnswerFormat(with_template(template))
    assert (found.tools, found.reasoning) == (tools, reasoning)


def test_names_replace_what_the_template_tells() -> None:
    tokenizer = with_template("{{ tools }}<tool_call></think>")
    for name in (*TOOL_PARSERS, NONE):
        assert AnswerFormat(tokenizer, tools=name).tools == name
    for name in (*REASONING_PARSERS, NONE):
        assert AnswerFormat(tokenizer, reasoning=name).reasoning == name
    with pytest.raises(ConfigError, match="--tool-call-parser must be auto, none, hermes"):
        AnswerFormat(tokenizer, tools="other")
    with pytest.raises(ConfigError, match="--reasoning-parser"):
        AnswerFormat(tokenizer, reasoning="other")


def test_without_a_template_nothing_is_parsed() -> None:
    found = AnswerFormat(Tokenizer(StandInBackend(300)))
    assert not found.parses(tools=True, reasoning=True)


def test_what_is_parsed_follows_from_the_request() -> None:
    found = AnswerFormat(with_template("{{ tools }}<tool_call></think>"))
    assert found.parses(tools=True, reasoning=False)
    assert found.parses(tools=False, reasoning=True)
    assert not found.parses(tools=False, reasoning=False)
    harmony = AnswerFormat(with_template("{{ tools }}<|channel|>"))
    assert harmony.parses(tools=False, reasoning=False), "its text has channels in any case"


def answer(parser: AnswerParser, text: str) -> tuple[str, str, int]:
    found = parse_answer(parser, text)
    return found.content, found.reasoning, len(found.calls)


def test_the_prompt_s_end_begins_the_reasoning() -> None:
    text = f"So.</think>Yes.<tool_call>{CALL}</tool_call>"
    qwen = AnswerFormat(with_template("{{ tools }}<tool_call></think>"))
    assert answer(qwen.parser("a:<think>\n", {"f": {}}, reasoning=True), text) == ("Yes.", "So.", 1)
    assert answer(qwen.parser("a:", {}, reasoning=True), text) == (text, "", 0)
    assert answer(qwen.parser("a:<think>", {}, reasoning=False), text) == (text, "", 0)
    r1 = AnswerFormat(with_template("{{ tools }}<tool_call></think>"), reasoning="deepseek_r1")
    assert answer(r1.parser("a:", {"f": {}}, reasoning=True), text) == ("Yes.", "So.", 1)
    assert answer(r1.parser("a:<think>\n\n</think>\n\n", {}, reasoning=True), "Yes.") == ("Yes.", "", 0)


def test_special_tokens_of_the_form_are_in_the_text() -> None:
    library = byte_level_library()
    library.add_tokens([AddedToken(one, special=True) for one in ("<tool_call>", "<think>", "</think>", "<other>")])
    tokenizer = Tokenizer(FastBackend(library), template=ChatTemplate("{{ tools }}<tool_call></think>", {}))
    found = AnswerFormat(tokenizer)
    assert set(map(tokenizer.backend.vocabulary_entry, found.visible_ids)) == {"<tool_call>", "<think>", "</think>"}
    text = f"<think>a</think><other>b<tool_call>{CALL}"
    detokenizer = Detokenizer(tokenizer, visible_ids=found.visible_ids)
    shown = "".join(detokenizer.push(token)[0] for token in tokenizer.encode(text)) + detokenizer.finish()
    assert shown == text.replace("<other>", "")


def test_the_end_of_a_prompt() -> None:
    tokenizer = with_template("")
    assert prompt_end(tokenizer, "x" * 500 + "<think>").endswith("x<think>")
    assert prompt_end(tokenizer, list(b"y" * 500 + b"<think>")).endswith("y<think>")
    assert len(prompt_end(tokenizer, "x" * 500)) < 500
