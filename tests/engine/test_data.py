"""Where the shipped data is found."""

import json
import sys
from pathlib import Path

import pytest

from engine import data
from engine.errors import ConfigError
from engine.model.config.config_json import read_config_json


def test_beside_the_packages_in_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "datasets" / "presets").mkdir(parents=True)
    monkeypatch.setattr(data, "__file__", str(tmp_path / "engine" / "data.py"))
    assert data.datasets_folder() == tmp_path / "datasets"


def test_under_the_prefix_of_an_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site-packages"
    (site / "datasets" / "presets").mkdir(parents=True)  # the library of that name, at its worst
    (site / "datasets" / "__init__.py").touch()
    installed = tmp_path / "share" / "redline" / "datasets"
    (installed / "presets").mkdir(parents=True)
    monkeypatch.setattr(data, "__file__", str(site / "engine" / "data.py"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert data.datasets_folder() == installed


def test_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "__file__", str(tmp_path / "engine" / "data.py"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(ConfigError, match="presets are missing"):
        data.datasets_folder()


def test_known_models_are_configs_that_can_be_read() -> None:
    files = data.known_models()
    assert files["meta-llama/Meta-Llama-3.1-8B-Instruct"] == files["Llama-3.1-8B-Instruct"]
    for file in set(files.values()):
        text = read_config_json(file, file.name, {}).get_text_config()
        assert text.hidden_size == json.loads(file.read_text()).get("text_config", {}).get(
            "hidden_size", text.hidden_size
        )
        assert text.num_attention_heads % text.num_key_value_heads == 0
