"""Phases of a start sum to its wall time."""

import re
import time
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import phases
from engine.phases import SHORT_S, Phases, ledger_line, process_start


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(phases, "time", SimpleNamespace(monotonic=lambda: self.now))


def test_phases_follow_each_other_without_a_gap(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    ledger = Phases(98.0)
    ledger.end("first")
    clock.now += 3
    ledger.end("second", 1.0)
    ledger.end("third")
    clock.now += 4
    ledger.add({"fourth": 1.0, "first": 2.0}, "rest")
    assert ledger.seconds == {"first": 4.0, "second": 1.0, "third": 2.0, "fourth": 1.0, "rest": 1.0}
    assert ledger.total == clock.now - 98.0


@given(st.lists(st.floats(0, 20), min_size=1, max_size=12))
def test_the_line_sums_to_the_total(durations: list[float]):
    ledger = Phases(0.0)
    for number, seconds in enumerate(durations):
        ledger.end(f"phase {number}", seconds)
    total, *parts = map(float, re.findall(r"(\d+\.\d\d) s", ledger_line(ledger)))
    assert total == pytest.approx(sum(durations), abs=0.006)
    assert sum(parts) == pytest.approx(total, abs=0.006 * (1 + len(parts)))
    assert sum(part < SHORT_S for part in parts) <= 1, "short ones are summed up"


def test_the_start_of_this_process_is_that_which_the_system_has():
    started = process_start() - time.monotonic() + time.time()
    assert started == pytest.approx(psutil.Process().create_time(), abs=1.0)
