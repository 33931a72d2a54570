"""The causes of faults of encoders, on one rank and on several."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.worker.encoder_faults import CAUSE_BYTES, agreement, error_of
from engine.worker.gloo_group import GlooGroup


def fail(error: BaseException) -> None:
    raise error


def test_any_error_is_a_cause_but_interrupts_are_not() -> None:
    assert error_of(lambda: None) == ""
    assert error_of(lambda: fail(ValueError("a shape\nof the tower"))) == "ValueError: a shape"
    assert error_of(lambda: fail(MemoryError())).startswith("MemoryError (out of memory: lower ")
    with pytest.raises(KeyboardInterrupt):
        error_of(lambda: fail(KeyboardInterrupt()))


def test_one_rank_agrees_with_itself() -> None:
    assert agreement()(["", "a cause"]) == ["", "a cause"]


def test_ranks_have_the_cause_of_the_first_that_has_one(tmp_path: Path) -> None:
    long = "é" * CAUSE_BYTES
    causes = [["", "first", "", ""], ["", "second", "only here", long]]

    def run(rank: int) -> list[str]:
        group = GlooGroup(rank, 2, str(tmp_path / "store"))
        return agreement(group)(causes[rank])

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(run, range(2)))
    assert found == [["", "first", "only here", long[: CAUSE_BYTES // 2]]] * 2
