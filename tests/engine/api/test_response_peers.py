"""Responses that other API processes keep."""

from pathlib import Path

import pytest

from engine.api.error_responses import ApiError
from engine.api.http_options import Limits
from engine.api.response_peers import SharedResponses
from engine.api.response_store import StoredResponse, Turn

ITEMS = [{"type": "message", "content": "é" * 100_000}]


async def test_each_process_sees_the_responses_of_all(tmp_path: Path) -> None:
    first, second = [SharedResponses(Limits(), process, str(tmp_path)) for process in range(2)]
    await first.open()
    await second.open()
    name, deleted = first.new_id(), first.new_id()
    for one in (name, deleted):
        first.put(one, StoredResponse(b'{"a":1}', (Turn(ITEMS), Turn([])), 7))
    for side in (first, second):
        found = await side.get(name, 7)
        assert (found.body, [turn.items for turn in found.turns]) == (b'{"a":1}', [ITEMS, []])
        with pytest.raises(ApiError, match="was evicted") as caught:
            await side.get(name, 8, "previous_response_id")
        assert (caught.value.status, caught.value.param) == (404, "previous_response_id")
    await second.delete(deleted, 7)
    assert len(first.own) == 1
    with pytest.raises(ApiError, match="was evicted"):
        await second.delete(deleted, 7)
    first.close()
    second.close()


async def test_a_process_that_is_gone_has_no_responses(tmp_path: Path) -> None:
    first, gone = [SharedResponses(Limits(), process, str(tmp_path)) for process in range(2)]
    with pytest.raises(ApiError, match="belongs to API process 1, which does not answer") as caught:
        await first.get(gone.new_id(), None)
    assert (caught.value.status, caught.value.code) == (503, "process_lost")


async def test_a_single_process_asks_nobody() -> None:
    alone, other = SharedResponses(Limits()), SharedResponses(Limits(), 5)
    with pytest.raises(ApiError, match="was evicted"):
        await alone.get(other.new_id(), None)
