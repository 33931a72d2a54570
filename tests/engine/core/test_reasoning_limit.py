"""Reasoning ends after its budget, however its text is divided into tokens; everything else is as without one."""

import re
import threading
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.grammars import GrammarManager
from engine.core.reasoning_limit import ReasoningLimit
from engine.errors import RequestError
from engine.frontend.answer_format import HARMONY_REASONING, AnswerFormat
from engine.frontend.parsing import harmony
from engine.frontend.parsing.events import AnswerParser, Reasoning
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.tokenizer_backends import StandInBackend
from engine.messages import FinishReason
from engine.reasoning import ReasoningBudget, ReasoningMarks
from tests.engine.core_driver import Driver, resolved
from tests.engine.fake_executor import VOCABULARY, expected_tokens

PATIENCE_S = 60.0
BYTES = [bytes([one]) for one in range(256)]


def marks_of(form: str) -> ReasoningMarks:
    found = AnswerFormat(Tokenizer(StandInBackend(300)), reasoning=form).reasoning_marks
    assert found is not None
    return found


TAGS, CHANNELS = marks_of("qwen3"), marks_of(HARMONY_REASONING)


class Pieces:
    """A vocabulary of single bytes and of other pieces."""

    special_ids = ()

    def __init__(self, *more: bytes, basic: list[bytes] = BYTES):
        self.pieces = list(dict.fromkeys([*basic, *more]))

    def encode(self, text: str) -> list[int]:
        return [self.pieces.index(bytes([one])) for one in text.encode() if bytes([one]) in self.pieces]


def generate(marks: ReasoningMarks, vocabulary: Pieces, wanted: list[int], budget: int, *, is_open: bool) -> list[int]:
    """The output of a model that wants to write these tokens, each as soon as it may."""
    limit = ReasoningLimit(marks, vocabulary).deep_copy()
    limit.begin(ReasoningBudget(marks, budget, is_open))
    words = np.empty(len(vocabulary.pieces) // 32 + 1, np.int32)
    output: list[int] = []
    for token in wanted:
        while True:
            limit.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            allowed = np.unpackbits(words.view(np.uint8), bitorder="little")
            chosen = token if allowed[token] else int(np.flatnonzero(allowed)[0])
            assert limit.consume_token(chosen)
            output.append(chosen)
            if chosen == token:
                break
            assert np.count_nonzero(allowed) == 1
            assert len(output) < 10 * len(wanted) + 10, "the end of the reasoning is written again and again"
    return output


def reasoning_tokens(parser: AnswerParser, vocabulary: Pieces, tokens: list[int]) -> int:
    """The number of tokens with reasoning, if no mark begins within one of them."""
    events = [parser.feed(vocabulary.pieces[token].decode()) for token in tokens]
    return sum(any(isinstance(event, Reasoning) for event in each) for each in events)


def divide(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    return [data[begin:end] for begin, end in pairwise(places)]


def text_of(vocabulary: Pieces, tokens: list[int]) -> bytes:
    return b"".join(vocabulary.pieces[token] for token in tokens)


bodies = st.one_of(
    st.text("ab \né</", max_size=24),
    st.lists(st.sampled_from(["<", "/", "think", ">", "</think>", "a"]), max_size=12).map("".join),
)


@settings(deadline=None)
@given(
    st.sampled_from(["open", "<think>", " \n<think>\n", "<thin", ""]),
    bodies,
    bodies,
    st.lists(st.integers(1, 80), max_size=40),
    st.integers(0, 20),
    st.booleans(),
)
def test_reasoning_is_never_longer_than_its_budget(
    before: str, body: str, after: str, cuts: list[int], budget: int, has_whole_marker: bool
) -> None:
    is_open = before == "open"
    data = ((before if not is_open else "") + body + "</think>" + after).encode()
    pieces = divide(data, cuts)
    vocabulary = Pieces(*pieces, *([b"</think>"] if has_whole_marker else []))
    wanted = [vocabulary.pieces.index(piece) for piece in pieces]
    output = generate(TAGS, vocabulary, wanted, budget, is_open=is_open)
    opened = 0 if is_open else data.find(b"<think>") + len("<think>")
    ends = np.cumsum(list(map(len, pieces))).tolist()
    if not is_open and not data.lstrip().startswith(b"<think>"):
        assert output == wanted, "an output without reasoning"
        return
    written = text_of(vocabulary, output)
    closed = written.find(b"</think>", opened)
    places = np.cumsum([0, *(len(vocabulary.pieces[token]) for token in output)]).tolist()
    found = sum(begin < closed and opened < end for begin, end in pairwise(places))
    begun = not is_open and opened not in ends  # the token that ends the first tag may begin the reasoning
    assert found <= max(budget, begun)
    closed = data.find(b"</think>", opened) + len(b"</think>")
    inside = [end for end in ends if opened < end and end - closed < 0]  # tokens before the one that ends the marker
    if len(inside) < budget:
        assert output == wanted, "the model ends its reasoning in time"
    same = next((at for at, pair in enumerate(zip(output, wanted, strict=False)) if pair[0] != pair[1]), len(wanted))
    if output != wanted:
        assert len([end for end in ends[:same] if end > opened]) >= budget, "it is ended too early"
        kept = text_of(vocabulary, wanted[:same])
        assert written.startswith(kept)
        assert b"</think>" in written[max(len(kept) - len("</think>") + 1, 0) :]


HEADERS = ["analysis", " analysis", "final", "commentary to=functions.f", "analysis to=python", "analyst"]
parts = st.lists(st.tuples(st.sampled_from(HEADERS), st.text("ab \n", max_size=12)), max_size=5)


@settings(deadline=None)
@given(parts, st.lists(st.integers(1, 30), max_size=20), st.integers(0, 20), st.booleans())
def test_all_parts_of_the_reasoning_share_the_budget(
    messages: list[tuple[str, str]], cuts: list[int], budget: int, is_open: bool
) -> None:
    """Marks are tokens of their own, as in the vocabulary of such models."""
    text = "<|end|><|start|>assistant".join(f"<|channel|>{channel}<|message|>{body}" for channel, body in messages)
    text = ("ab<|end|>" if is_open else "") + text
    pieces: list[bytes] = []
    for part in re.split(r"(<\|\w+\|>)", text):
        pieces += [part.encode()] if part.startswith("<|") else divide(part.encode(), cuts)
    vocabulary = Pieces(*pieces, *(mark.encode() for mark in harmony.MARKS))
    wanted = [vocabulary.pieces.index(piece) for piece in pieces]
    output = generate(CHANNELS, vocabulary, wanted, budget, is_open=is_open)
    prompt = "<|start|>assistant" + ("<|channel|>analysis<|message|>x" if is_open else "")
    parser = harmony.HarmonyParser(prompt, calls=False, reasoning=True)
    assert parser.reasons == is_open
    found = reasoning_tokens(parser, vocabulary, output)
    in_full = reasoning_tokens(harmony.HarmonyParser(prompt, calls=False, reasoning=True), vocabulary, wanted)
    assert found <= budget
    assert (output == wanted) == (in_full <= budget) or in_full == budget
    assert found == min(budget, in_full)


def test_what_the_model_has_written_of_the_marker_is_not_written_again() -> None:
    vocabulary = Pieces()
    wanted = list(b"ab</think>c")
    assert generate(TAGS, vocabulary, wanted, 2, is_open=True) == wanted
    assert generate(TAGS, vocabulary, wanted, 4, is_open=True) == wanted
    assert bytes(generate(TAGS, vocabulary, list(b"ab</b>c"), 4, is_open=True)) == b"ab</think>b>c"
    assert bytes(generate(TAGS, vocabulary, list(b"ab"), 0, is_open=True)) == b"</think>ab"
    assert bytes(generate(TAGS, vocabulary, list(b"<think>ab"), 0, is_open=False)) == b"<think></think>ab"
    assert bytes(generate(TAGS, vocabulary, list(b"ab<think>ab"), 0, is_open=False)) == b"ab<think>ab"
    whole = Pieces(b"</think>")
    assert generate(TAGS, whole, list(b"ab<"), 3, is_open=True) == [*b"ab<"]
    assert generate(TAGS, whole, list(b"ab<c"), 3, is_open=True) == [*b"ab<", whole.pieces.index(b"</think>"), ord("c")]


def test_a_model_without_tokens_for_the_marker() -> None:
    with pytest.raises(RequestError, match="no tokens for '</think>'"):
        ReasoningLimit(TAGS, Pieces(basic=[b"a", b"<"]))


# The fake worker's tokens as texts: they end the reasoning in one or in three tokens.
LETTERS = [bytes([ord("A") + one]) for one in range(VOCABULARY)]
ONE, THREE = [*LETTERS], [*LETTERS]
ONE[13] = b"</think>"
THREE[3:6] = [b"</", b"think", b">"]


class Fixed(Pieces):
    def __init__(self, pieces: list[bytes]):
        super().__init__(basic=pieces)

    def encode(self, text: str) -> list[int]:
        assert text == "</think>"
        return [3, 4, 5]


def expected(prompt: list[int], most: int, budget: int, marker: list[int]) -> list[int]:
    output: list[int] = []
    while len(output) < most:
        ended = any(output[at : at + len(marker)] == marker for at in range(len(output)))
        if ended or len(output) < budget:
            output += expected_tokens([*prompt, *output], 1)
            continue
        begun = next(n for n in range(len(marker) - 1, -1, -1) if not n or output[-n:] == marker[:n])
        output.append(marker[begun])
    return output


class Limited:
    """A core whose worker samples with masks."""

    def __init__(self, pieces: list[bytes], **options: Any):
        self._is_compiled = threading.Event()
        self._grammars = GrammarManager(lambda: Fixed(pieces), self._is_compiled.set)
        self.driver = Driver(resolved(**options), lambda *_: 0.001, grammars=self._grammars)
        self.driver.worker.obeys_masks = True

    def run(self) -> None:
        self.driver.turn()
        assert not self._grammars.parked or self._is_compiled.wait(PATIENCE_S)
        self.driver.run()
        self._grammars.close()


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 49), st.one_of(st.none(), st.integers(0, 30))), min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from([{}, {"num_blocks": 20}, {"draft_tokens": 3}, {"ablations": frozenset({"full-state"})}]),
)
def test_whatever_else_runs(asked: list[tuple[int, int | None]], whole: bool, options: dict[str, Any]) -> None:
    pieces, marker = (ONE, [13]) if whole else (THREE, [3, 4, 5])
    core = Limited(pieces, **options)
    driver, handles = core.driver, []
    for first, budget in asked:
        limit = None if budget is None else ReasoningBudget(TAGS, budget, is_open=True)
        handles.append(driver.add([first, 7], 36, reasoning=limit))
    core.run()
    for handle, (first, budget) in zip(handles, asked, strict=True):
        free = expected_tokens([first, 7], 36)
        assert driver.tokens[handle] == (free if budget is None else expected([first, 7], 36, budget, marker))
        assert driver.finished[handle].reason == FinishReason.LENGTH


def test_steps_run_in_bursts_again_once_the_reasoning_is_over() -> None:
    core = Limited(ONE)
    driver = core.driver
    handle = driver.add([1, 2], 50, reasoning=ReasoningBudget(TAGS, 10, is_open=True))
    core.run()
    assert driver.tokens[handle] == expected([1, 2], 50, 10, [13])
    lengths = [message.num_steps for message in driver.worker.steps]
    assert set(lengths[:10]) == {1}
    assert max(lengths) > 1


def test_a_token_in_place_of_the_marker_is_a_fault_of_the_engine() -> None:
    core = Limited(ONE)
    driver = core.driver
    driver.worker.obeys_masks = False
    handle = driver.add([1, 2], 50, reasoning=ReasoningBudget(TAGS, 0, is_open=True))
    core.run()
    assert driver.finished[handle].reason == FinishReason.FAILED
    assert "the end of the reasoning, token 13, is due" in driver.finished[handle].error
