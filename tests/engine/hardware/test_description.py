"""Descriptions of hardware are data that is checked when it is read."""

from pathlib import Path

import pytest

from engine.data import datasets_folder
from engine.errors import ConfigError
from engine.hardware.description import hardware_names, read_hardware

H100 = datasets_folder() / "hardware" / "h100.yaml"


@pytest.mark.parametrize("name", hardware_names())
def test_descriptions_that_ship_are_read(name: str) -> None:
    hardware = read_hardware(name)
    assert hardware.bandwidth > 1e12
    assert hardware.host.v1.step_seconds(64, 1) < hardware.host.v1.step_seconds(64, 4)


def test_unknown_names_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"sim:h1000: no such hardware; known are a100, b200, h100, h200"):
        read_hardware("h1000")


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("{value: 84.9, source: memory}", "{value: -80, source: memory}", r"> 0.0 - at .*memory_gb.value"),
        ("{value: 84.9, source: memory}", "{value: 84.9, source: web}", "sources has no web"),
        ("bandwidth_tb_s", "bandwidth", "missing required field `bandwidth_tb_s`|unknown field `bandwidth`"),
        ("[8192, 524288,", "[524288, 8192,", "ascending order"),
        ("2: [2.9, 5.5,", "2: [5.5,", r"all_reduce.ranks.2 needs 5 times"),
        ("{1: 10, 2: 77}", "{2: 77}", "host.v1.request_us needs a value for 1 rank"),
        ("title:", "- title:", "is not a hardware description"),
    ],
)
def test_errors_name_the_file_and_the_field(old: str, new: str, error: str, tmp_path: Path) -> None:
    text = H100.read_text()
    assert old in text
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=error) as raised:
        read_hardware(str(path))
    assert "mine.yaml" in str(raised.value)
