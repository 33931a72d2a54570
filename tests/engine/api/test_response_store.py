"""The store of responses: what it holds, its limits, and whom it answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.api.error_responses import ApiError
from engine.api.http_options import Limits
from engine.api.response_store import ResponseStore, StoredResponse, Turn, process_of

actions = st.lists(st.tuples(st.sampled_from(["put", "get", "delete"]), st.integers(0, 5), st.integers(0, 300)))


@given(actions, st.integers(0, 4), st.integers(0, 600))
def test_its_size_is_that_of_what_it_holds(done: list[tuple[str, int, int]], most: int, most_bytes: int) -> None:
    store = ResponseStore(Limits(max_stored_responses=most, max_stored_bytes=most_bytes), 0)
    held: dict[str, StoredResponse] = {}  # all that were put, the last used at the end
    names: list[str] = []
    for action, which, size in done:
        if action == "put":
            before = held[names[which]].turns if which < len(names) and names[which] in held else ()
            response = StoredResponse(b"x" * (size // 3), (*before, Turn([{"text": "x" * size}])), None)
            names.append(store.new_id())
            held[names[-1]] = response
            store.put(names[-1], response)
            held = {name: one for name, one in held.items() if is_held(store, name)}
        elif which < len(names) and names[which] in held:
            assert store.get(names[which], None) is held[names[which]]
            held[names[which]] = held.pop(names[which])
            if action == "delete":
                store.delete(names[which], None)
                del held[names[which]]
        turns = {turn for one in held.values() for turn in one.turns}
        size = sum(len(one.body) for one in held.values()) + sum(len(turn.data) for turn in turns)
        assert store.num_bytes == size <= most_bytes
        assert len(store) == len(held) <= most


def is_held(store: ResponseStore, name: str) -> bool:
    """Whether a response is in the store; asks in the order of use, which stays."""
    try:
        store.get(name, None)
    except ApiError:
        return False
    return True


def test_what_is_not_stored_is_missing() -> None:
    store = ResponseStore(Limits(), 0)
    for name in (store.new_id(), "resp_1", "x", ""):
        with pytest.raises(ApiError, match="was evicted") as caught:
            store.get(name, None, "previous_response_id")
        assert (caught.value.status, caught.value.param) == (404, "previous_response_id")


def test_ids_have_the_number_of_their_process() -> None:
    assert process_of(ResponseStore(Limits(), 11).new_id()) == 11
    assert process_of("resp_1") is None
