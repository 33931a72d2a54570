import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.simulation.processes import Report, run_all
from tests.bench.simulation.interrupted_jobs import wait_and_save


def square(report: Report, number: int) -> tuple[int, int]:
    report(f"squaring {number}")
    if number < 0:
        raise BenchError(f"{number} is negative")
    return number * number, os.getpid()


class TwoPartsError(Exception):
    """An error that can't be sent to another process: its arguments are not those of its constructor."""

    def __init__(self, first: str, second: str):
        super().__init__(f"{first} and {second}")


def fail_in_two_parts(_report: Report) -> None:
    raise TwoPartsError("one", "two")


def die(_report: Report, number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("processes", [1, 2])
def test_results_carry_the_number_of_their_job(processes: int) -> None:
    shown: list[tuple[int, str]] = []
    found = dict(run_all(square, [(3,), (4,), (5,)], processes, lambda *what: shown.append(what)))
    assert {number: result for number, (result, _) in found.items()} == {0: 9, 1: 16, 2: 25}
    assert sorted(shown) == [(0, "squaring 3"), (1, "squaring 4"), (2, "squaring 5")]
    assert (os.getpid() in {pid for _, pid in found.values()}) == (processes == 1)


def test_an_error_of_a_job_is_raised() -> None:
    with pytest.raises(BenchError, match="-1 is negative") as raised:
        list(run_all(square, [(-1,), (2,)], 2, lambda *_: None))
    assert "in square" in raised.value.__notes__[0]
    with pytest.raises(RuntimeError, match="TwoPartsError: one and two"):
        list(run_all(fail_in_two_parts, [(), ()], 2, lambda *_: None))


@pytest.mark.parametrize(("number", "cause"), [(signal.SIGKILL, "memory: lower --jobs"), (signal.SIGTERM, "15")])
def test_a_process_that_is_killed_is_an_error_in_one_line(number: signal.Signals, cause: str) -> None:
    with pytest.raises(BenchError, match=f"a process that simulates was (killed|ended).*{cause}"):
        list(run_all(die, [(number,), (number,)], 2, lambda *_: None))


def test_one_job_needs_no_process() -> None:
    assert list(run_all(square, [(2,)], 8, lambda *_: None)) == [(0, (4, os.getpid()))]


def test_an_interrupt_ends_jobs_in_progress_and_begins_no_other(tmp_path: Path) -> None:
    begun: set[int] = set()

    def interrupt(number: int, _: str) -> None:
        begun.add(number)
        if begun == {0, 1}:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run_all(wait_and_save, [(tmp_path, n) for n in range(4)], 2, interrupt))
    assert names_in(tmp_path) == ["begun-0", "begun-1", "saved-0", "saved-1"]


def test_a_consumer_that_stops_ends_all_processes(tmp_path: Path) -> None:
    results = run_all(square, [(1,), (2,), (3,)], 2, lambda *_: None)
    _, (_, pid) = next(results)
    results.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_ctrl_c_in_a_terminal_interrupts_jobs_once(tmp_path: Path) -> None:
    """A terminal sends SIGINT to all processes of its foreground group, here in a session of its own."""
    command = [sys.executable, "-m", "tests.bench.simulation.interrupted_jobs", str(tmp_path)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    with process:
        try:
            wait_until(lambda: {"begun-0", "begun-1"} <= set(names_in(tmp_path)), process)
            os.killpg(process.pid, signal.SIGINT)
            _, errors = process.communicate(timeout=120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, errors
    assert names_in(tmp_path) == ["begun-0", "begun-1", "saved-0", "saved-1"]
    assert "Traceback" not in errors


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_jobs_end_with_the_process_that_began_them(stopped: bool, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench.simulation.interrupted_jobs", str(tmp_path)]
    with subprocess.Popen(command, start_new_session=True) as process:
        begun = [tmp_path / f"begun-{number}" for number in (0, 1)]
        wait_until(lambda: all(path.exists() and path.read_text() for path in begun), process)
        workers = [int(path.read_text()) for path in begun]
        if stopped:
            for pid in workers:
                os.kill(pid, signal.SIGSTOP)
        process.kill()
    wait_until(lambda: not any(is_running(pid) for pid in workers))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(
    condition: Callable[[], bool], process: "subprocess.Popen[str] | subprocess.Popen[bytes] | None" = None
) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None
        time.sleep(0.02)
