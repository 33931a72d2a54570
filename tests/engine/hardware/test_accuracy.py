import hashlib
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.hardware.accuracy import description_version, known_errors, simulation_mark
from engine.hardware.description import hardware_names


def test_errors_are_of_shipped_hardware() -> None:
    assert set(known_errors()) <= set(hardware_names())
    for metrics in known_errors().values():
        assert set(metrics) <= {"tpot", "ttft"}
        for error in metrics.values():
            assert 0 <= error.median <= error.p90
            assert error.rows > 0


def test_the_version_changes_with_the_description(tmp_path: Path) -> None:
    mark = simulation_mark("h100")
    assert mark["title"] == "NVIDIA H100 SXM 80 GB"
    assert mark["description"] == description_version("h100")
    text = (Path("datasets") / "hardware" / "h100.yaml").read_text()
    own = tmp_path / "own.yaml"
    own.write_text(text.replace("value: 3.35", "value: 3.36"))
    assert description_version(str(own)) == hashlib.sha256(own.read_bytes()).hexdigest()[:12]
    assert simulation_mark(str(own))["description"] != mark["description"]
    assert simulation_mark(str(own))["errors"] == {}


def test_unknown_hardware_has_no_mark() -> None:
    with pytest.raises(ConfigError, match="no such hardware"):
        simulation_mark("h99")
