"""Fixtures that several rooms share."""

import math

import pytest

from bench import machine
from bench.loadgen import recording


@pytest.fixture
def patient_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests over real sockets that aren't about the generator or the machine: a busy one spoils no point."""
    monkeypatch.setattr(machine, "DISTURBED_SHARE", math.inf)
    for limit in ("CPU_SHARE_LIMIT", "DELAY_LIMIT_S", "DELAY_FLOOR_S", "STARVED_FLOOR_S"):
        monkeypatch.setattr(recording, limit, math.inf)
