"""What a core can't take is answered to its sender, however little of it can be read, and harms nobody."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.columns import column
from engine.core.intake import leading_ints
from engine.messages import AddRequest, FinishReason, MMInputRef, Sampling, UtilityResult, encode, make_handle
from tests.engine.core_driver import Driver
from tests.engine.fake_executor import expected_tokens

HANDLE = make_handle(0, 77)


def raw(**changes: Any) -> bytes:
    """An AddRequest with fields of any type."""
    fields = msgspec.msgpack.decode(encode(AddRequest(HANDLE, column([1, 2, 3]), 4, Sampling())))
    names = ["tag", *AddRequest.__struct_fields__]
    for name, value in changes.items():
        fields[names.index(name)] = value
    return msgspec.msgpack.encode(fields)


def serve_beside(data: bytes) -> Driver:
    """Send it between two good requests, which must get their tokens."""
    driver = Driver()
    first = driver.add([5, 6], max_tokens=4)
    driver.turn()
    driver.core.receive(data)
    second = driver.add([7], max_tokens=3)
    driver.run()
    assert driver.tokens[first] == expected_tokens([5, 6], 4)
    assert driver.tokens[second] == expected_tokens([7], 3)
    assert driver.core.scheduler.pool.num_free == 64
    assert not driver.core.scheduler.requests
    return driver


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": "text"}, "could not read this request"),
        ({"prompt": b"abc"}, "3 bytes, which is not a multiple of 4 (int32)"),
        ({"prompt": b""}, "the prompt has 0 tokens"),
        ({"max_tokens": 1.5}, "Expected `int`, got `float`"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": -4}, "max_tokens is -4"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"min_tokens": "x"}, "Expected `int`, got `str`"),
        ({"stop_ids": [2**40]}, "stop_token_ids"),
        ({"stop_ids": [-1]}, "stop_token_ids"),
        ({"stop_ids": [1.5]}, "Expected `int`"),
        ({"priority": 2**64 - 1}, None),
        ({"sampling": [0.0, 1.0, 1.5]}, "Expected `int`, got `float`"),
        ({"sampling": [0.0, 1.0, 0, 0.0, -1]}, "seed is -1"),
        ({"adapter": "dutch"}, "no adapter called 'dutch' is served"),
        ({"mm_inputs": [[b"a", 0, 10**15]]}, "multimodal input 0 claims tokens 0 to 999999999999999"),
        ({"mm_inputs": [[b"a", -(10**15), 10]]}, "multimodal input 0 claims"),
        (
            {"mm_inputs": [[b"a", 0, 1], [b"a", 1, 2]]},
            "multimodal input 1 has 2 embeddings, another one with the same hash has 1",
        ),
    ],
)
def test_a_request_with_a_value_that_can_not_be_served_is_answered(changes: dict[str, Any], said: str | None):
    driver = serve_beside(raw(**changes))
    end = driver.finished[HANDLE]
    if said is None:
        assert end.reason == FinishReason.LENGTH
    else:
        assert end.reason in (FinishReason.ERROR, FinishReason.FAILED, FinishReason.NOT_SERVED)
        assert said in end.error


@pytest.mark.parametrize("cut", [15, 20, 30])
def test_a_request_that_was_cut_short_is_answered(cut: int):
    driver = serve_beside(raw()[:cut])
    assert "could not read this request" in driver.finished[HANDLE].error


def test_a_call_that_can_not_be_read_is_answered():
    driver = serve_beside(msgspec.msgpack.encode([2, 0, 31, "adapters", "no arguments"]))
    [answer] = [one for one in driver.messages if isinstance(one, UtilityResult)]
    assert answer.call == 31
    assert "could not read this request" in answer.error


def test_an_answer_that_can_not_be_sent_is_an_error():
    driver = Driver()
    driver.core._utilities["odd"] = object
    driver.core.receive(msgspec.msgpack.encode([2, 0, 31, "odd", {}]))
    driver.run()
    [answer] = [one for one in driver.messages if isinstance(one, UtilityResult)]
    assert "the answer can't be sent" in answer.error


@pytest.mark.parametrize("data", [b"", b"\xc1 not msgpack", b"\x93", b"\x93\x00", b"\xdd\x00", b"\x93\x07\x01\x02"])
def test_what_nobody_can_be_answered_for_harms_nobody(data: bytes):
    assert len(serve_beside(data).finished) == 2


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(st.integers(-(2**63), 2**64 - 1), st.text()), max_size=20), st.integers(0, 200))
def test_whole_numbers_at_the_front_are_read_as_far_as_they_are_there(values: list[Any], cut: int):
    expected = []
    for value in values[:3]:
        if not isinstance(value, int):
            break
        expected.append(value)
    data = msgspec.msgpack.encode(values)
    assert leading_ints(data, 3) == expected
    short = leading_ints(data[:cut], 3)
    assert short == expected[: len(short)]


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_no_value_of_any_field_ends_the_engine(data: st.DataObject):
    numbers = st.one_of(st.integers(-(2**63), 2**64 - 1), st.integers(-5, 70), st.floats())
    values = st.recursive(
        st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=5), st.binary(max_size=12)),
        lambda inner: st.lists(inner, max_size=4),
        max_leaves=8,
    )
    fields = data.draw(st.dictionaries(st.sampled_from(AddRequest.__struct_fields__[1:]), values, max_size=3))
    driver = serve_beside(raw(**fields))
    assert HANDLE in driver.finished


def test_items_of_one_hash_and_two_lengths_are_refused_while_one_of_them_is_there():
    driver = Driver()
    image, longer = MMInputRef(b"aa", 1, 3), MMInputRef(b"aa", 1, 4)
    first = driver.add([1] * 8, max_tokens=4, mm_inputs=(image,))
    clash = driver.add([1] * 8, max_tokens=4, mm_inputs=(longer,))
    same = driver.add([1] * 9, max_tokens=4, mm_inputs=(image,))
    driver.run()
    assert driver.finished[clash].error == "multimodal input 0 has 4 embeddings, another one with the same hash has 3"
    assert driver.tokens[first] == expected_tokens([1] * 8, 4, mm_inputs=(image,))
    assert driver.tokens[same] == expected_tokens([1] * 9, 4, mm_inputs=(image,))
    later = driver.add([1] * 8, max_tokens=4, mm_inputs=(longer,))
    driver.run()
    assert driver.tokens[later] == expected_tokens([1] * 8, 4, mm_inputs=(longer,)), "nobody has the other one any more"
    assert driver.cached[later] == 0, "blocks of the other length are not its own"
    assert driver.core.scheduler.encoder_cache.cache.size_of == {b"aa": 4}
