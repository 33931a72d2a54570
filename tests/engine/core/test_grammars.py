"""Requests wait for their grammars without holding up others; what is compiled is kept."""

import threading
from collections.abc import Iterator

import pytest

from engine.core import grammar_compiler, grammars
from engine.core.grammars import GrammarManager
from engine.frontend.grammar_vocabulary import GrammarVocabulary
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.tokenizer_backends import StandInBackend
from engine.grammar import TOO_MANY, Grammar
from engine.messages import FinishReason, Shutdown, encode
from tests.engine.core_driver import Driver
from tests.engine.fake_executor import VOCABULARY, expected_tokens

# The fake worker samples without masks; its tokens conform to this.
ANYTHING = Grammar("regex", r"(?s:.)*")
PATIENCE_S = 60.0


class Gate:
    """Grammars whose compilation begins when the gate is opened."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.turn = threading.Event()
        self.manager = GrammarManager(self._load, self.turn.set)
        self.driver = Driver(grammars=self.manager)

    def _load(self) -> GrammarVocabulary:
        assert self.is_open.wait(PATIENCE_S)
        return GrammarVocabulary(Tokenizer(StandInBackend(VOCABULARY)), VOCABULARY)

    def run_until_parked(self) -> None:
        """Until only requests without a grammar are left."""
        for _ in range(1000):
            if not self.driver.turn():
                if not self.driver.core.scheduler.has_work:
                    return
                self.driver.advance()

    def open(self) -> None:
        self.is_open.set()
        assert self.turn.wait(PATIENCE_S)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.is_open.set()
    gate.manager.close()


def test_a_request_waits_for_its_grammar_and_others_do_not(gate: Gate) -> None:
    driver = gate.driver
    waiting, free = driver.add([1, 2], grammar=ANYTHING), driver.add([3, 4])
    gate.run_until_parked()
    assert driver.tokens[free] == expected_tokens([3, 4], 8)
    assert gate.manager.parked == [waiting]
    assert driver.core.has_work
    gate.open()
    driver.run()
    assert driver.tokens[waiting] == expected_tokens([1, 2], 8)
    assert driver.finished[waiting].reason == FinishReason.LENGTH


def test_waiting_requests_are_aborted(gate: Gate) -> None:
    driver = gate.driver
    first, second = driver.add([1], grammar=ANYTHING), driver.add([2], grammar=ANYTHING)
    driver.turn()
    driver.abort(first)
    driver.turn()
    assert (driver.finished[first].reason, gate.manager.parked) == (FinishReason.ABORT, [second])
    driver.core.receive(encode(Shutdown(drain_s=1.0)))
    driver.turn()
    driver.clock.advance(2.0)
    driver.turn()
    assert driver.finished[second].reason == FinishReason.ABORT
    assert driver.core.finished


def test_a_grammar_that_can_not_be_used_ends_its_request(gate: Gate) -> None:
    driver = gate.driver
    broken = driver.add([1], grammar=Grammar("regex", "a("))
    driver.turn()
    gate.open()
    driver.run()
    assert driver.finished[broken].reason == FinishReason.ERROR
    assert "unclosed group" in driver.finished[broken].error


def test_a_token_that_the_grammar_does_not_allow_is_a_fault_of_the_engine(gate: Gate) -> None:
    """The fake worker samples without masks; the last token counts as well."""
    driver = gate.driver
    gate.is_open.set()
    wrong = [driver.add([1], most, grammar=Grammar("regex", "[0-9]{9}")) for most in (1, 8)]
    driver.turn()
    assert gate.turn.wait(PATIENCE_S)
    driver.run()
    for one in wrong:
        assert driver.finished[one].reason == FinishReason.FAILED
        assert "the engine sampled a token that the grammar excludes" in driver.finished[one].error


def test_a_grammar_that_is_too_complex_ends_its_request_as_an_error_of_the_request(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_LEXER_STATES", 20)
    driver = gate.driver
    gate.is_open.set()
    handle = driver.add([1], 40, grammar=Grammar("regex", r"(?s:.)*[\x00-\x3f](?s:.){8}"))
    driver.turn()
    assert gate.turn.wait(PATIENCE_S)
    driver.run()
    assert driver.finished[handle].reason == FinishReason.ERROR
    assert "too many states" in driver.finished[handle].error


def test_the_newest_grammars_are_kept_and_the_number_that_wait_is_limited(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "MAX_CACHED", 2)
    monkeypatch.setattr(grammars, "MAX_COMPILING", 3)
    first = [gate.manager.check("regex", one) for one in "abc"]
    assert gate.manager.check("regex", "d").result(PATIENCE_S).cause == TOO_MANY
    gate.is_open.set()
    assert all(one.result(PATIENCE_S).compile_s >= 0 for one in first)
    assert gate.manager.check("regex", "d").result(PATIENCE_S).compile_s >= 0
    assert gate.manager.check("regex", "c").result(PATIENCE_S).compile_s < 0
    assert gate.manager.check("regex", "a").result(PATIENCE_S).compile_s >= 0, "it was dropped for a newer one"
