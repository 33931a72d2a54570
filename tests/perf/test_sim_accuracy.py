"""The errors that results carry are those of the engine, the hardware and the kind of load that users simulate."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.perf import sim_accuracy
from tests.perf.sim_accuracy import known_errors


def figures(count: int, error: float, **change: Any) -> list[dict[str, Any]]:
    row = {"hardware": "h100", "engine": "v1", "load": "closed", "metric": "tpot_mean", "published": 10.0}
    return [row | change | {"simulated": 10.0 * (1 + error)} for _ in range(count)]


def test_only_closed_loops_of_the_engine_itself_count() -> None:
    rows = [
        *figures(6, 0.02), *figures(4, -0.04),
        *figures(9, 0.5, engine="trtllm"), *figures(9, 0.5, engine="sglang"), *figures(9, 0.5, load="rate"),
        *figures(9, 0.5, load="at once"), *figures(9, 0.5, metric="e2e_latency_mean"),
    ]  # fmt: skip
    assert known_errors(rows) == {"h100": {"v1": {"tpot": {"median": 0.02, "p90": 0.04, "rows": 10}}}}


def test_errors_stand_by_hardware_engine_and_metric() -> None:
    rows = [
        *figures(5, 0.1), *figures(5, 0.2, engine="v0"), *figures(5, 0.3, metric="ttft_mean"),
        *figures(5, 0.4, hardware="h200"), *figures(4, 0.5, hardware="a100"),
    ]  # fmt: skip
    found = known_errors(rows)
    medians = {
        (hardware, engine, metric): errors["median"]
        for hardware, engines in found.items()
        for engine, metrics in engines.items()
        for metric, errors in metrics.items()
    }
    assert medians == {
        ("h100", "v1", "tpot"): 0.1, ("h100", "v0", "tpot"): 0.2, ("h100", "v1", "ttft"): 0.3,
        ("h200", "v1", "tpot"): 0.4,
    }  # fmt: skip


def test_the_command_writes_the_file_that_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hardware").mkdir()
    check = tmp_path / "sim-check.json"
    check.write_text(json.dumps({"figures": figures(5, 0.1)}))
    monkeypatch.setattr(sim_accuracy, "datasets_folder", lambda: tmp_path)
    monkeypatch.setattr(sys, "argv", ["sim_accuracy", str(check)])
    sim_accuracy.main()
    written = json.loads((tmp_path / "hardware" / "accuracy.json").read_text())
    assert written == json.loads(capsys.readouterr().out) == known_errors(figures(5, 0.1))
