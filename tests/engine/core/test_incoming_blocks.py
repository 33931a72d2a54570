"""How long a request waits for blocks of its prompt."""

import pytest

from engine.columns import column
from engine.core.incoming_blocks import ARRIVAL_S, ArrivedBlocks, IncomingBlocks
from engine.core.request import Request
from engine.kv_transfer import Place, PrefillEnded
from engine.messages import AddRequest, Sampling

HANDLE = 7
KEYS: dict[Place, bytes] = {(0, number): bytes([number]) * 16 for number in range(6)}


@pytest.fixture
def incoming() -> IncomingBlocks:
    """A prompt of six blocks was requested at 0 s; its prefill has ended at 3 s."""
    made = IncomingBlocks(range(8))
    request = Request(AddRequest(HANDLE, column(range(30)), 1, Sampling()), 64, 0.0)
    assert made.wait(request, 0, dict(KEYS))
    assert [one.handle for one in made.take_wanted(0.0)] == [HANDLE]
    made.end(PrefillEnded(HANDLE), 3.0)
    return made


def arrive(incoming: IncomingBlocks, number: int, now: float) -> None:
    assert incoming.put(HANDLE, (0, number), KEYS[0, number], lambda _: None)
    incoming.arrive(ArrivedBlocks(HANDLE, ((0, number),), 0), now)


def released(incoming: IncomingBlocks, now: float) -> bool:
    incoming.expire(now)
    return [one.handle for one in incoming.take_released()] == [HANDLE]


def test_blocks_that_keep_coming_are_waited_for(incoming: IncomingBlocks) -> None:
    for number, now in enumerate((4.0, 5.5, 7.0, 8.5, 10.0)):
        arrive(incoming, number, now)
        assert not released(incoming, now)
    arrive(incoming, 5, 10.9)
    assert released(incoming, 10.9)
    assert incoming.counters.lost == 0


def test_a_pause_is_the_end(incoming: IncomingBlocks, caplog: pytest.LogCaptureFixture) -> None:
    arrive(incoming, 0, 4.0)
    assert incoming.next_deadline == 4.0 + ARRIVAL_S
    assert not released(incoming, 8.9)
    assert released(incoming, 9.0)
    assert incoming.counters.lost == 1
    assert "5 KV blocks of a prompt are computed here: none has arrived for 5 s" in caplog.text


def test_a_network_that_takes_longer_than_the_prefill_is_not_waited_for(
    incoming: IncomingBlocks, caplog: pytest.LogCaptureFixture
) -> None:
    for number, now in enumerate((6.0, 9.0)):
        arrive(incoming, number, now)
    assert incoming.next_deadline == 3.0 + 3.0 + ARRIVAL_S
    assert not released(incoming, 10.9)
    assert released(incoming, 11.0)
    assert "4 KV blocks of a prompt are computed here: they take longer to arrive than to compute" in caplog.text
