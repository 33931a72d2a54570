import csv
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import BenchError
from bench.planning.options import Candidate, PlanRequest
from bench.planning.rows import (
    DOES_NOT_FIT,
    FAILED,
    NOT_SUPPORTED,
    Row,
    limited_by,
    metric_name,
    ordered,
    read_plan,
    with_price,
    write_plan,
)  # fmt: skip
from tests.plots.made import Server, make_point

SERVING = Row(
    "h100", "NVIDIA H100 SXM 80 GB", 2, "abc", "KV capacity", rate_per_replica=5.0, replicas=3, gpus=6,
    load_per_replica=4.0, output_tok_s=24_000.0, total_tok_s=30_000.0, ttft_p99_ms=300.0, itl_p99_ms=20.0,
)  # fmt: skip
UNFIT = Row("a100", "NVIDIA A100", 1, "abc", "does not fit", note="weights need 141 GB")


def test_costs_are_those_of_all_gpus() -> None:
    row = with_price(SERVING, 2.5)
    assert row.dollars_per_hour == 15.0
    assert row.dollars_per_million_output == pytest.approx(15 / (24_000 * 3600) * 1e6)
    assert row.dollars_per_million_total == pytest.approx(15 / (30_000 * 3600) * 1e6)
    assert with_price(row, None) == SERVING
    assert with_price(UNFIT, 2.5) == UNFIT


rows = st.builds(
    lambda hardware, tp, replicas, price: with_price(
        replace(SERVING, hardware=hardware, tp=tp, replicas=replicas, gpus=replicas and replicas * tp), price
    ),
    st.sampled_from(["a", "b", "c"]), st.sampled_from([1, 2, 4]), st.none() | st.integers(1, 9),
    st.none() | st.floats(0.5, 9),
)  # fmt: skip


@given(st.lists(rows, max_size=8))
def test_the_cheapest_is_first_and_those_that_cannot_serve_are_last(given_rows: list[Row]) -> None:
    found = ordered(given_rows)
    assert sorted(map(repr, found)) == sorted(map(repr, given_rows))
    assert found == ordered(list(reversed(given_rows)))
    serving = [row for row in found if row.replicas is not None]
    assert found[: len(serving)] == serving
    costs = [row.dollars_per_hour for row in serving if row.dollars_per_hour is not None]
    assert costs == sorted(costs)
    gpus = [row.gpus for row in serving if row.dollars_per_hour is None]
    assert gpus == sorted(gpus)


def test_a_latency_limit_is_named() -> None:
    point, _ = make_point(Server(4.0), "v1", "w", 5.0, "search", 50)
    point = replace(point, binding="latency limit", itl_p99_ms=60.0, ttft_p99_ms=100.0)
    assert limited_by(point, {"itl_p99_ms": 50.0, "ttft_p99_ms": 200.0}, "latency limit") == "ITL P99"
    assert limited_by(point, {"itl_p99_ms": 50.0, "ttft_p99_ms": 90.0}, "latency limit") == "ITL P99, TTFT P99"
    assert limited_by(replace(point, binding="KV cache"), {}, "KV cache") == "KV capacity"
    assert limited_by(None, {}, "not reached") == "not reached"
    assert metric_name("e2e_p50_ms") == "E2E P50"


def test_files_have_all_rows_and_are_read_again(tmp_path: Path) -> None:
    marks = {"h100": {"title": "NVIDIA H100", "errors": {"tpot": {"median": 0.04, "p90": 0.1, "rows": 9}}}}
    write_plan(tmp_path, "digest", {"rate": 12.0}, marks, [UNFIT, SERVING])
    assert read_plan(tmp_path, "digest") == ([SERVING, UNFIT], marks)
    with (tmp_path / "plan.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["hardware"] for row in table] == ["h100", "a100"]
    assert table[0]["output_tok_s"] == "24000"
    assert table[1]["replicas"] == ""
    with pytest.raises(BenchError, match="another plan"):
        read_plan(tmp_path, "other")


def test_broken_files_are_reported(tmp_path: Path) -> None:
    assert read_plan(tmp_path, "digest") == ([], {})
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(BenchError, match="cannot be read"):
        read_plan(tmp_path, "digest")


def test_the_digest_ignores_prices_only() -> None:
    request = PlanRequest("m", {"kind": "random", "input": 5, "output": 5}, 4.0, {"ttft_p99_ms": 100.0})
    assert request.digest("1") == replace(request, prices={"h100": 2.0}).digest("1")
    for other in (replace(request, rate=5.0), replace(request, limits={}), replace(request, flags=("--x",))):
        assert other.digest("1") != request.digest("1")
    assert request.digest("2") != request.digest("1")


def test_flags_of_a_candidate() -> None:
    request = PlanRequest("m", {}, 1.0, {}, flags=("--max-model-len", "64"))
    assert Candidate("h100", 4).flags(request) == [
        "--max-model-len", "64", "--device", "sim:h100", "--tensor-parallel-size", "4",
    ]  # fmt: skip


def test_the_page_explains_every_word_for_what_limits_a_replica() -> None:
    page = (Path(__file__).parents[3] / "docs" / "simulation" / "plan.md").read_text()
    bindings = ("KV cache", "batch slots", "compute", "not reached", "undecided")
    for word in (*(limited_by(None, {}, binding) for binding in bindings), DOES_NOT_FIT, NOT_SUPPORTED, FAILED):
        assert f"| {word} |" in page
