"""The check of the latency model: rows become loads, loads are simulated, and nothing is left out in silence."""

import csv
import json
import sys
from pathlib import Path

import pytest

from tests.perf import sim_check
from tests.perf.sim_check import Comparison, error_rows, knee, knees, total_rows
from tests.perf.sim_loads import simulate
from tests.perf.sim_rows import COLUMNS, FIGURE, Case, read_cases

ROW = {
    "model": "Llama-3.1-8B-Instruct", "hw": "H100-SXM-80G", "tp": "1", "dtype": "bf16", "engine": "vllm",
    "version": "0.11.0", "isl": "1024", "osl": "32", "load_kind": "max-concurrency", "load_value": "4",
    "source": "a page", "metric": "tpot_mean", "value": "7.5", "unit": "ms",
}  # fmt: skip


def written(path: Path, *changes: dict[str, str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, (*COLUMNS, *FIGURE))
        writer.writeheader()
        writer.writerows(ROW | change for change in changes)
    return path


def case_of(path: Path, **change: str) -> Case:
    cases, skipped = read_cases(written(path / "rows.csv", change))
    assert not skipped
    return cases[0]


def test_figures_of_one_load_are_one_case(tmp_path: Path) -> None:
    ttft = {"metric": "ttft_mean", "value": "0.12", "unit": "s"}
    cases, skipped = read_cases(written(tmp_path / "rows.csv", {}, ttft, {"load_value": "8"}))
    assert not skipped
    assert [(one.value, one.published) for one in cases] == [
        (4.0, (("tpot_mean", 7.5), ("ttft_mean", 120.0))),
        (8.0, (("tpot_mean", 7.5),)),
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hw": "L40S"}, "no description of L40S"),
        ({"model": "Qwen3-30B-A3B"}, "a mixture of experts"),
        ({"model": "Falcon-180B"}, "the shape of the model is not known"),
        ({"dtype": "int4"}, "weights in int4"),
        ({"load_kind": "qps", "load_value": "n/a"}, "the rate of requests is not in the file"),
        ({"isl": "n/a"}, "the lengths of its requests are not in the file"),
        ({"load_kind": "replay"}, "loads of the kind replay"),
    ],
)
def test_what_is_not_simulated_has_a_reason(change: dict[str, str], reason: str, tmp_path: Path) -> None:
    cases, (skipped,) = read_cases(written(tmp_path / "rows.csv", change))
    assert not cases
    assert skipped.figures == 1
    assert reason in skipped.reason


def test_rows_say_which_engine_dtype_and_lengths(tmp_path: Path) -> None:
    old = case_of(tmp_path, version="0.7.0 V0", dtype="fp16", load_kind="qps", isl="sharegpt", osl="sharegpt")
    assert (old.engine, old.shape.gemm_dtype, old.load, old.input, old.spread) == ("v0", "bf16", "rate", 217, 0.0)
    source = "InferenceMAX: kv fp8, max-num-seqs=conc, random-range-ratio .8"
    other = case_of(tmp_path, engine="nim-trtllm", dtype="fp8", source=source)
    assert (other.engine, other.shape.gemm_dtype, other.shape.kv_dtype, other.spread) == ("trtllm", "fp8", "fp8", 0.8)
    assert case_of(tmp_path, load_kind="burst-N", load_value="100").load == "at once"
    assert case_of(tmp_path, load_kind="offline-200", load_value="inf").value == 200


def test_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("model,hw\na,b\n")
    with pytest.raises(ValueError, match=r"has no column .*tp"):
        read_cases(path)


def test_a_closed_loop_has_the_times_of_its_concurrency(tmp_path: Path) -> None:
    alone, eight = (simulate(case_of(tmp_path, load_value=value)) for value in ("1", "8"))
    assert 5 < alone["tpot_mean"] < eight["tpot_mean"] < 20
    assert alone["ttft_mean"] < eight["ttft_mean"]
    assert eight["output_tput"] > 3 * alone["output_tput"]
    assert simulate(case_of(tmp_path, load_value="8")) == eight


def test_a_model_that_does_not_fit_is_named(tmp_path: Path) -> None:
    large = sim_check.compare(case_of(tmp_path, model="Llama-3.1-70B"))
    assert large == "the memory has room for 0 tokens, a request has 1,056"


@pytest.mark.parametrize("engine", ["trtllm", "sglang"])
def test_other_engines_are_simulated(engine: str, tmp_path: Path) -> None:
    assert 5 < simulate(case_of(tmp_path, engine=engine))["tpot_mean"] < 20


def test_loads_at_once_and_by_rate(tmp_path: Path) -> None:
    burst = simulate(case_of(tmp_path, load_kind="burst-N", load_value="40"))
    assert burst["req_tput"] == pytest.approx(40 / (burst["duration"] / 1e3))
    assert burst["output_tput"] == pytest.approx(32 * burst["req_tput"])
    slow, fast = (
        simulate(case_of(tmp_path, load_kind="qps", load_value=rate, version=version, isl="sharegpt", osl="sharegpt"))
        for rate, version in (("1", "0.7.0 V1"), ("6", "0.7.0 V0"))
    )
    assert slow["e2e_latency_mean"] < fast["e2e_latency_mean"]


def test_errors_are_summarized_by_server_and_in_total(tmp_path: Path) -> None:
    case = case_of(tmp_path)
    pairs = [Comparison(case, "tpot_mean", 10, value) for value in (9.0, 10.5, 12.0)]
    (row,) = error_rows(pairs)
    assert (row["hardware"], row["engine"], row["tp"], row["metric"], row["n"]) == ("h100", "v1", 1, "tpot_mean", 3)
    assert (row["median_error"], row["bias"]) == (0.1, 0.05)
    assert {(one["engine"], one["hardware"]) for one in total_rows(pairs)} == {
        ("v1", "all"), ("all", "h100"), ("all", "all")
    }  # fmt: skip


def test_a_knee_lies_between_two_measured_rates(tmp_path: Path) -> None:
    assert knee([5, 10, 20], [1.0, 1.5, 4.0]) == (10, 20)
    assert knee([5, 10], [1.0, 1.5]) == (10, None)
    cases = [case_of(tmp_path, load_kind="qps", load_value=value) for value in ("5", "10")]
    pairs = [Comparison(one, "e2e_latency_mean", 1000 * n, 900 * n) for n, one in zip((1, 3), cases, strict=True)]
    (row,) = knees(pairs)
    assert (row["published_knee"], row["simulated_knee"]) == ((5, 10), (5, 10))


def test_the_command_writes_rows_and_what_it_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = written(tmp_path / "rows.csv", {}, {"hw": "L40S"}), tmp_path / "out" / "check.json"
    monkeypatch.setattr(sys, "argv", ["sim_check", str(file), "--out", str(out)])
    assert sim_check.main() == 0
    result = json.loads(out.read_text())
    assert [row["n"] for row in result["rows"]] == [1]
    assert result["not_simulated"][0]["reason"] == "no description of L40S"
    assert "1 figures simulated, 1 not" in capsys.readouterr().out


def test_the_command_asks_for_a_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sim_check"])
    with pytest.raises(SystemExit):
        sim_check.main()
    assert "make sim-check DATA=FILE" in capsys.readouterr().err
