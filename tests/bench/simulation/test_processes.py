import os

import pytest

from bench.errors import BenchError
from bench.simulation.processes import Report, run_all


def square(report: Report, number: int) -> tuple[int, int]:
    report(f"squaring {number}")
    if number < 0:
        raise BenchError(f"{number} is negative")
    return number * number, os.getpid()


@pytest.mark.parametrize("processes", [1, 2])
def test_results_carry_the_number_of_their_job(processes: int) -> None:
    shown: list[tuple[int, str]] = []
    found = dict(run_all(square, [(3,), (4,), (5,)], processes, lambda *what: shown.append(what)))
    assert {number: result for number, (result, _) in found.items()} == {0: 9, 1: 16, 2: 25}
    assert sorted(shown) == [(0, "squaring 3"), (1, "squaring 4"), (2, "squaring 5")]
    assert (os.getpid() in {pid for _, pid in found.values()}) == (processes == 1)


def test_an_error_of_a_job_is_raised() -> None:
    with pytest.raises(BenchError, match="-1 is negative"):
        list(run_all(square, [(-1,), (2,)], 2, lambda *_: None))


def test_one_job_needs_no_process() -> None:
    assert list(run_all(square, [(2,)], 8, lambda *_: None)) == [(0, (4, os.getpid()))]
