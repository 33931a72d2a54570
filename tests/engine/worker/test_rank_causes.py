"""Causes that ranks share, on one rank and on several."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.worker.gloo_group import GlooGroup
from engine.worker.rank_causes import CAUSE_BYTES, agreement


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
