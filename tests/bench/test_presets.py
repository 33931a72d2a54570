"""Where the shipped data is found."""

import sys
from pathlib import Path

import pytest

from bench import presets
from bench.errors import BenchError


def test_beside_the_packages_in_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "datasets" / "presets").mkdir(parents=True)
    monkeypatch.setattr(presets, "__file__", str(tmp_path / "bench" / "presets.py"))
    assert presets.datasets_folder() == tmp_path / "datasets"


def test_under_the_prefix_of_an_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site-packages"
    (site / "datasets" / "presets").mkdir(parents=True)  # the library of that name, at its worst
    (site / "datasets" / "__init__.py").touch()
    installed = tmp_path / "share" / "redline" / "datasets"
    (installed / "presets").mkdir(parents=True)
    monkeypatch.setattr(presets, "__file__", str(site / "bench" / "presets.py"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert presets.datasets_folder() == installed


def test_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "__file__", str(tmp_path / "bench" / "presets.py"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(BenchError, match="presets are missing"):
        presets.datasets_folder()
