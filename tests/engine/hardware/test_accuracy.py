import hashlib
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.devices.simulated import SimulatedMachine
from engine.errors import ConfigError
from engine.hardware.accuracy import description_version, known_errors, simulation_mark
from engine.hardware.description import hardware_names
from engine.hardware.profile_file import write_description
from tests.engine.hardware.test_profile_file import description


def test_errors_are_of_shipped_hardware_and_of_the_engine_itself() -> None:
    assert set(known_errors()) <= set(hardware_names())
    for engines in known_errors().values():
        assert set(engines) <= {"v1", "v0"}
        for metrics in engines.values():
            assert set(metrics) <= {"tpot", "ttft"}
            for error in metrics.values():
                assert 0 <= error.median <= error.p90
                assert error.rows >= 5


def test_the_version_changes_with_the_description(tmp_path: Path) -> None:
    mark = simulation_mark("h100", "v1")
    assert mark["title"] == "NVIDIA H100 SXM 80 GB"
    assert mark["description"] == description_version("h100")
    text = (Path("datasets") / "hardware" / "h100.yaml").read_text()
    own = tmp_path / "own.yaml"
    own.write_text(text.replace("value: 3.35", "value: 3.36"))
    assert description_version(str(own)) == hashlib.sha256(own.read_bytes()).hexdigest()[:12]
    changed = simulation_mark(str(own), "v1")
    assert changed["description"] != mark["description"]
    assert changed["errors"] == {}


def test_v1_has_its_own_errors_and_v0_says_that_its_costs_are_not_validated() -> None:
    v1, v0 = simulation_mark("h100", "v1"), simulation_mark("h100", "v0")
    assert v1 == simulation_mark("h100", None)
    assert (v1["engine"], v0["engine"]) == ("v1", "v0")
    assert set(v1["errors"]) == {"tpot", "ttft"}
    assert "note" not in v1
    assert v0["errors"] == {}
    for name in hardware_names():
        note = simulation_mark(name, "v0")["note"]
        assert note.startswith("host costs of V0: Read off a figure")
        assert note.endswith("not validated")
        config = EngineConfig(model="llama-3.1-8b", device=f"sim:{name}", engine="v0")
        assert f"--device sim:{name}: {note}" in SimulatedMachine(config).warnings(config)


def test_costs_of_v0_that_were_measured_have_no_note(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    write_description(path, description())
    assert "note" not in simulation_mark(str(path), "v0")


def test_unknown_hardware_has_no_mark() -> None:
    with pytest.raises(ConfigError, match="no such hardware"):
        simulation_mark("h99", "v1")
