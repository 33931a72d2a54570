"""Signals that ask a server to end."""

import signal

import pytest

from engine import signals
from engine.signals import EndRequests, exit_code_of


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_exit_codes_are_those_of_shells(number: int, code: int) -> None:
    assert exit_code_of(number) == code


def test_a_signal_to_the_process_and_then_to_its_group_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    requests = EndRequests()
    assert requests.add(signal.SIGTERM)
    assert not requests.add(signal.SIGTERM)
    now += signals.SAME_REQUEST_S / 2
    assert not requests.add(signal.SIGTERM)
    assert requests.count == 1
    now += signals.SAME_REQUEST_S
    assert requests.add(signal.SIGTERM)
    assert requests.add(signal.SIGINT), "another signal is another request"
    assert (requests.count, requests.number) == (3, signal.SIGINT)
