"""Descriptions of other processors, and of busy machines, are doubted."""

from engine.hardware.description import THIS_MACHINE, read_hardware
from engine.hardware.profiled import profile_warnings
from tests.engine.hardware.test_profile_file import description


def test_a_profile_of_another_processor_or_of_a_busy_machine_is_doubted() -> None:
    assert profile_warnings(THIS_MACHINE, description()) == []
    assert profile_warnings("h100", read_hardware("h100")) == []
    (other,) = profile_warnings(THIS_MACHINE, description(processor="Another One"))
    assert "on another processor (Another One): run `redline profile` again" in other
    assert profile_warnings("theirs.yaml", description(processor="Another One")) == []
    (busy,) = profile_warnings("theirs.yaml", description(busy=0.31))
    assert "others used 31% of the cores" in busy
