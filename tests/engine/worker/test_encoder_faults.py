"""The causes of faults of encoders."""

import pytest

from engine.worker.encoder_faults import error_of


def fail(error: BaseException) -> None:
    raise error


def test_any_error_is_a_cause_but_interrupts_are_not() -> None:
    assert error_of(lambda: None) == ""
    assert error_of(lambda: fail(ValueError("a shape\nof the tower"))) == "ValueError: a shape"
    assert error_of(lambda: fail(MemoryError())).startswith("MemoryError (out of memory: lower ")
    with pytest.raises(KeyboardInterrupt):
        error_of(lambda: fail(KeyboardInterrupt()))
