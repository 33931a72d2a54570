import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.frontend.parsing.call_parser import CallParser
from engine.frontend.parsing.events import Content, PlainText, Reasoning, parse_answer
from engine.frontend.parsing.json_calls import JsonFormat
from engine.frontend.parsing.reasoning import ReasoningParser, Tags
from tests.engine.frontend.parsing.texts import check, divided, parsed, texts_of

THINK = Tags("<think>", "</think>")
CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'


@given(divided(texts_of("<think>", "</think>", "<think>\nSo.\n</think>\n\nYes", "\n", CALL)), st.booleans())
def test_the_text_may_be_divided_anywhere(parts: list[str], opened: bool) -> None:
    calls = JsonFormat(markers=("<tool_call>",), close="</tool_call>")
    check(lambda: ReasoningParser(THINK, CallParser(calls), opened=opened), parts)
    answer = check(lambda: ReasoningParser(THINK, PlainText(), opened=opened), parts)
    text = "".join(parts)
    if not opened and not text.lstrip().startswith("<think>"):
        assert (answer.content, answer.reasoning) == (text, "")


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("<think>\nSo.\n</think>\n\nYes.", False, "So.", "Yes."),
        ("So.\n</think>\n\nYes.", True, "So.", "Yes."),
        ("\n<think>a\n\nb</think>c", False, "a\n\nb", "c"),
        ("<think>cut", False, "cut", ""),
        ("cut", True, "cut", ""),
        ("<think></think>Yes", False, "", "Yes"),
        ("Yes <think>no</think>", False, "", "Yes <think>no</think>"),
        ("", True, "", ""),
        ("<thin", False, "", "<thin"),
    ],
)
def test_reasoning_and_content(text: str, opened: bool, reasoning: str, content: str) -> None:
    answer = parse_answer(ReasoningParser(THINK, PlainText(), opened=opened), text)
    assert parsed(answer) == (content, reasoning, [])


def test_reasoning_is_streamed() -> None:
    parser = ReasoningParser(THINK, PlainText(), opened=False)
    assert parser.feed("<think>a") == [Reasoning("a")]
    assert parser.feed("b</") == [Reasoning("b")]
    assert parser.feed("x") == [Reasoning("</x")]
    assert parser.feed("</think>c") == [Content("c")]


def test_prompts_open_and_close_reasoning() -> None:
    assert THINK.is_open("<|im_start|>assistant\n<think>\n")
    assert not THINK.is_open("<|im_start|>assistant\n")
    assert THINK.is_closed("<think>\n\n</think>\n\n")
