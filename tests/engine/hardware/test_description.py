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
        ("[8192, 524288,", "[0, 524288,", r">= 1 - at .*all_reduce.elements"),
        ("{1: 10, 2: 77}", "{0: 5, 1: 10}", r">= 1 - at .*request_us"),
        (
            "patches: [256, 576, 1500], compute: [0.145, 0.365, 0.45]",
            "patches: [], compute: []",
            "tower.patches must be one",
        ),
        ("compute: [0.145, 0.365, 0.45]", "compute: [0.145, 0.365]", "tower needs compute for each of its patches"),
        ("patches: [256,", "patches: [0,", r">= 1 - at .*patches"),
        ("title:", "made: 2026-13-45\ntitle:", "is not a hardware description: month must be in"),
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


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"title: \xff\xfe")
    with pytest.raises(ConfigError, match=r"mine.yaml is not a hardware description: .* can't decode"):
        read_hardware(str(path))

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    path.write_bytes(H100.read_bytes())
    with pytest.raises(ConfigError, match=r"mine.yaml can't be read: Permission denied"):
        read_hardware(str(path))


@pytest.mark.parametrize("field", ["max_num_seqs", "max_num_batched_tokens", "min_chunk", "block_size"])
def test_defaults_of_zero_are_refused(field: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    defaults = {"max_num_seqs": 1, "max_num_batched_tokens": 1, "min_chunk": 1, "block_size": 1, field: 0}
    path.write_text(f"{H100.read_text()}defaults: {defaults | {'memory_utilization': 0.5}}\n")
    with pytest.raises(ConfigError, match=rf">= 1 - at .*defaults.{field}"):
        read_hardware(str(path))
