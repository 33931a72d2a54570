"""The number of tokens of reasoning, however they arrive."""

from hypothesis import given
from hypothesis import strategies as st

from engine.api.reasoning_tokens import ReasoningTokens
from engine.frontend.detokenizer import Detokenizer
from engine.frontend.parsing.events import PlainText
from engine.frontend.parsing.reasoning import ReasoningParser, Tags
from engine.frontend.streams import Delta
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.tokenizer_backends import StandInBackend

TOKENIZER = Tokenizer(StandInBackend(300))  # a token is a byte
TAGS = Tags("<think>", "</think>")
bodies = st.text(st.sampled_from("a b\né</"), max_size=20)


def count(text: str, cuts: list[int]) -> int:
    tokens = list(text.encode())
    counter = ReasoningTokens(ReasoningParser(TAGS, PlainText(), opened=False), Detokenizer(TOKENIZER), once=True)
    begin = 0
    for cut in sorted(min(cut, len(tokens)) for cut in cuts):
        counter.add(Delta(0, "", tokens[begin:cut]))
        begin = cut
    counter.add(Delta(0, "", tokens[begin:]))
    return counter.finish()


@given(bodies, bodies, st.lists(st.integers(0, 60), max_size=6))
def test_the_count_does_not_depend_on_how_tokens_arrive(reasoning: str, rest: str, cuts: list[int]) -> None:
    text = f"<think>{reasoning}</think>{rest}"
    found = count(text, cuts)
    assert found == count(text, [])
    assert found == len(reasoning.strip("\n").encode())


def test_an_output_that_ends_within_its_reasoning() -> None:
    assert count("<think>ab</thi", []) == len("ab</thi")
    assert count("<think>\n", []) == 0
    assert count("no reasoning", []) == 0


def test_a_stop_token_is_no_reasoning() -> None:
    for shows_stop in (False, True):
        parser = ReasoningParser(TAGS, PlainText(), opened=True)
        counter = ReasoningTokens(parser, Detokenizer(TOKENIZER), once=True, shows_stop=shows_stop)
        counter.add(Delta(0, "ab", list(b"abc"), finish_reason="stop", stop_reason=99))
        assert counter.finish() == 2 + shows_stop
