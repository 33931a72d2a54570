"""The watchdog, looked at by hand under a clock that the test moves."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import pytest

from engine.children import process_state
from engine.clock import FakeClock
from engine.core.watchdog import CALL_TIMEOUT_S, Watchdog, WatchedExecutor, dump_stacks


class Slow:
    """An executor whose work the test ends."""

    def __init__(self) -> None:
        self.open: list[Future] = []

    def submit(self, step: bytes) -> Future:
        return self._more()

    def sample(self, step: int, masks: bytes = b"") -> Future:
        return self._more()

    def call(self, method: str, arguments: dict) -> Future:
        return self._more()

    def shutdown(self) -> None: ...

    def _more(self) -> Future:
        self.open.append(Future())
        return self.open[-1]

    def finish(self, count: int = 1) -> None:
        for future in self.open[:count]:
            future.set_result(None)
        del self.open[:count]


@dataclass
class Rank:
    pid: int

    @property
    def state(self) -> str:
        return process_state(self.pid)

    def dump_stacks(self) -> None:
        os.kill(self.pid, signal.SIGUSR1)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class Watched:
    def __init__(self, ranks: Sequence[Rank] = ()) -> None:
        self.clock, self.inner = FakeClock(100.0), Slow()
        self.woken = 0
        self.executor = WatchedExecutor(self.inner, self.clock, self._wake)
        self.statuses: list[str] = []
        self.given_up: list[str] = []
        self.dumps: list[object] = []
        self.dog = Watchdog(
            self.executor,
            10.0,
            ranks,
            send_status=self.statuses.append,
            give_up=self.given_up.append,
            dump=self.dumps.append,
        )

    def _wake(self) -> None:
        self.woken += 1

    def launch(self, step: int) -> None:
        self.executor.submit(b"")
        self.executor.sample(step)

    def after(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.dog.check(self.clock.now())


@pytest.mark.parametrize(("finished", "phase", "step"), [(0, "forward", 7), (1, "sample", 7), (2, "forward", 8)])
def test_a_step_that_hangs_is_named_once_with_its_phase(finished: int, phase: str, step: int):
    watched = Watched()
    watched.launch(7)
    watched.launch(8)
    watched.inner.finish(finished)
    watched.after(9.0)
    assert watched.statuses == []
    watched.after(2.0)
    watched.after(1.0)
    [cause] = watched.statuses
    assert f"rank 0 (process {os.getpid()}) hangs in the {phase} phase of step {step}, for 11 s" in cause
    assert "--step-timeout 10" in cause
    assert watched.dumps == [()]
    assert watched.given_up == []


def test_time_counts_from_when_a_task_could_begin():
    watched = Watched()
    watched.launch(1)
    watched.launch(2)
    for _ in range(4):
        watched.after(9.0)
        watched.inner.finish()
    watched.after(100.0)
    assert watched.statuses == [], "slow, idle at last, but no task took too long"


def test_a_step_that_comes_back_is_forgiven():
    watched = Watched()
    watched.launch(1)
    watched.after(15.0)
    watched.inner.finish(2)
    watched.after(1.0)
    assert watched.statuses[1:] == [""]
    watched.launch(2)
    watched.after(11.0)
    assert "step 2" in watched.statuses[2]


def test_after_as_long_again_it_gives_up():
    watched = Watched()
    watched.launch(1)
    watched.after(11.0)
    watched.after(8.0)
    assert watched.given_up == []
    watched.after(2.0)
    [cause] = watched.given_up
    assert "for 21 s" in cause


def test_a_step_that_hangs_right_after_another_came_back_is_told_too():
    watched = Watched()
    watched.launch(1)
    watched.launch(2)
    watched.after(11.0)
    watched.inner.finish()
    watched.after(11.0)
    assert [cause[:6] for cause in watched.statuses] == ["rank 0", "", "rank 0"]
    assert "sample phase of step 1" in watched.statuses[2]


def test_the_loop_itself_may_hang():
    watched = Watched()
    watched.dog.loop_busy_since = watched.clock.now()
    watched.after(11.0)
    assert "loop" in watched.statuses[0]
    watched.dog.loop_busy_since = None
    watched.after(1.0)
    assert watched.statuses[1:] == [""]


def test_results_wake_the_loop():
    watched = Watched()
    watched.launch(1)
    watched.inner.finish(1)
    assert watched.woken == 0
    watched.inner.finish(1)
    assert watched.woken == 1
    assert watched.executor.current() is None


def test_the_rank_that_was_stopped_is_named():
    children = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2)]
    try:
        watched = Watched([Rank(child.pid) for child in children])
        watched.launch(3)
        children[1].send_signal(signal.SIGSTOP)
        while process_state(children[1].pid) != "T":
            pass
        watched.after(11.0)
        assert watched.statuses[0].startswith(f"rank 1 (process {children[1].pid}, stopped) hangs in the forward phase")
        children[1].send_signal(signal.SIGCONT)
        while any(process_state(child.pid) != "S" for child in children):
            pass  # one that has just begun may still read its files
        watched.after(11.0)
        assert watched.given_up[0].startswith("one of ranks 0 to 1")
    finally:
        for child in children:
            child.kill()
            child.communicate()


def test_stacks_of_this_process_and_of_a_rank_go_to_stderr(monkeypatch: pytest.MonkeyPatch):
    script = (
        "import sys, engine.children as c; c.leave_signals_to_parent()\n"
        "def hanging(): print('up', flush=True); sys.stdin.read()\n"
        "hanging()"
    )
    rank = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert rank.stdout is not None
    assert rank.stdout.readline() == b"up\n"
    with tempfile.TemporaryFile("w+") as ours:
        monkeypatch.setattr(sys, "stderr", ours)
        dump_stacks([Rank(rank.pid)])
        monkeypatch.undo()
        ours.seek(0)
        assert "test_stacks_of_this_process" in ours.read()
    # It goes on, and ends as usual.
    _, said = rank.communicate(timeout=20)
    assert rank.returncode == 0
    assert b"hanging" in said


def test_steps_that_wait_for_a_long_call_do_not_hang():
    watched = Watched()
    watched.executor.call("load_adapter", {"key": "a#1", "path": "slow disk"})
    watched.launch(1)
    watched.after(60.0)
    assert watched.statuses == [], "six times the timeout, but no step"
    watched.inner.finish()
    watched.after(9.0)
    assert watched.statuses == [], "the step could begin only now"
    watched.after(2.0)
    assert "forward phase of step 1, for 11 s" in watched.statuses[0]


def test_a_call_that_never_ends_is_named():
    watched = Watched()
    watched.executor.call("load_adapter", {})
    watched.after(CALL_TIMEOUT_S - 1)
    assert watched.statuses == []
    watched.after(2.0)
    assert watched.statuses == [f"rank 0 (process {os.getpid()}) hangs in load_adapter, for {CALL_TIMEOUT_S + 1:.0f} s"]
    watched.after(CALL_TIMEOUT_S)
    assert len(watched.given_up) == 1


@pytest.mark.parametrize("phase", ["forward", "sample"])
def test_a_step_that_hung_and_then_failed_did_not_come_back(phase: str, caplog: pytest.LogCaptureFixture):
    watched = Watched()
    watched.launch(1)
    if phase == "sample":
        watched.inner.finish()
    watched.after(11.0)
    for future in watched.inner.open:
        future.set_exception(RuntimeError("boom"))
    watched.after(1.0)
    assert len(watched.statuses) == 1, "the loop says why the engine ends: nobody is to hear that it is well"
    assert "the engine continues" not in caplog.text


def test_a_call_that_fails_after_long_is_over_like_any_other():
    watched = Watched()
    watched.executor.call("load_adapter", {})
    watched.after(CALL_TIMEOUT_S + 1)
    watched.inner.open.pop().set_exception(RuntimeError("no such file"))
    watched.after(1.0)
    assert watched.statuses[1:] == [""]
