"""Steps are captured one after the other while the engine is idle, and with pauses while it is busy."""

import threading
from concurrent.futures import Future
from typing import Any

import pytest

from engine.worker import graph_capture
from engine.worker.graph_capture import GraphCapture


class Ranks:
    """Captures `left` steps; `steps` are submitted during each capture."""

    def __init__(self, left: int, steps: int = 0, error: Exception | None = None):
        self.left = left
        self.num_steps = 0
        self.called = threading.Event()
        self.calls = 0
        self._steps = steps
        self._error = error

    def call(self, method: str, arguments: dict[str, Any]) -> "Future[Any]":
        assert (method, arguments) == ("capture_graph", {})
        answer: Future[Any] = Future()
        self.calls += 1
        self.left -= 1
        self.num_steps += self._steps
        if self._error is None:
            answer.set_result(self.left)
        else:
            answer.set_exception(self._error)
        self.called.set()
        return answer


@pytest.mark.parametrize(("ranks", "calls"), [(Ranks(4), 4), (Ranks(4, error=RuntimeError("shut down")), 1)])
def test_an_idle_engine_captures_until_nothing_is_left(
    ranks: Ranks, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_capture, "BUSY_PAUSE_S", 3600.0)
    capture = GraphCapture(ranks.call, lambda: ranks.num_steps)
    capture._thread.join(30)
    assert not capture._thread.is_alive()
    assert ranks.calls == calls


def test_a_busy_engine_has_pauses_and_ends_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_capture, "BUSY_PAUSE_S", 3600.0)
    ranks = Ranks(4, steps=1)
    capture = GraphCapture(ranks.call, lambda: ranks.num_steps)
    assert ranks.called.wait(30)
    capture.close()
    capture._thread.join(30)
    assert not capture._thread.is_alive()
    assert ranks.calls == 1
