"""Decoders of messages between processes: any bytes give a message of the type, or an error that says so."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.columns import column
from engine.messages import (
    Abort,
    AddRequest,
    Admitted,
    Finished,
    FromCore,
    MMInputRef,
    Outputs,
    Sampling,
    Shutdown,
    StepMessage,
    StepResult,
    ToCore,
    Utility,
    decode_from_core,
    decode_result,
    decode_step,
    decode_to_core,
    encode,
)
from engine.stats import Stats

# msgspec leaves text that is no UTF-8 to Python's own error.
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError)
Decode = Callable[[bytes], Any]
DECODERS: dict[str, tuple[Decode, Any]] = {
    "to core": (decode_to_core, ToCore),
    "from core": (decode_from_core, FromCore),
    "step": (decode_step, StepMessage),
    "result": (decode_result, StepResult),
}
MESSAGES: list[tuple[str, Any]] = [
    (
        "to core",
        AddRequest(5, column([1, 2]), 3, Sampling(0.5, logit_bias=((4, 1.0),)), mm_inputs=(MMInputRef(b"h", 0, 2),)),
    ),
    ("to core", Abort((1, 2))),
    ("to core", Utility(0, 1, "reset_prefix_cache", {"a": [1, None]})),
    ("to core", Shutdown(1.5)),
    ("from core", Outputs(1.0, column([1], "<i8"), column([2]), finished=(Finished(1, 0),), stats=Stats())),
    ("from core", Outputs(1.0, admitted=(Admitted(1, 2, 0.5),))),
    ("step", StepMessage(3, column([1]), (), column([[1, 0, 4]]), column([[1, 2]]))),
    ("result", StepResult(3, column([7, 8]), seconds=0.25)),
]


def read(kind: str, data: bytes) -> Any:
    """The message, or the error; every other exception is the test's failure."""
    decode, _ = DECODERS[kind]
    try:
        return decode(data)
    except UNREADABLE as error:
        return error


@pytest.mark.parametrize("kind", DECODERS)
@given(data=st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes(kind: str, data: bytes) -> None:
    assert isinstance(read(kind, data), (DECODERS[kind][1], *UNREADABLE))


@pytest.mark.parametrize(("kind", "message"), MESSAGES)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_damaged_messages(kind: str, message: Any, data: st.DataObject) -> None:
    whole = encode(message)
    assert read(kind, whole) == message
    cut = data.draw(st.integers(0, len(whole) - 1))
    assert isinstance(read(kind, whole[:cut]), UNREADABLE), "a message without its end"
    damaged = bytearray(whole)
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4)):
        damaged[place] = byte
    assert isinstance(read(kind, bytes(damaged)), (DECODERS[kind][1], *UNREADABLE))
