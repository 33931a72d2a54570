from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.results import RunFiles
from plots.compare import (
    METRICS,
    compare,
    failed_conditions,
    parse_condition,
    percent,
    percent_text,
    points_at_one_rate,
    throughput,
)
from plots.data import ReportError, load
from tests.plots.made import TWO, Server, assert_close, edited

ON, OFF = "prefix caching on", "prefix caching off"


@given(base=st.floats(0.001, 1e6), difference=st.floats(-99, 1000))
def test_percent_is_undone_by_applying_it(base: float, difference: float) -> None:
    assert_close(percent(base * (1 + difference / 100), base), difference, 1e-3) if abs(difference) > 0.01 else None


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (12.4, "+12 %"),
        (-3.42, "−3.4 %"),
        (0.01, "±0 %"),
        (-0.04, "±0 %"),
        (9.96, "+10 %"),
        (899, "+899 %"),
        (5223, "×53.2"),
    ],
)
def test_differences_in_words(difference: float, words: str) -> None:
    assert percent_text(difference) == words


def test_no_difference_from_what_was_not_measured() -> None:
    assert percent(None, 1.0) is None
    assert percent(1.0, None) is None
    assert percent(1.0, 0.0) is None
    assert percent(float("nan"), 1.0) is None


def test_latencies_are_compared_at_the_highest_rate_all_sustain(demo: Path) -> None:
    (comparison,) = compare(load([demo]))
    assert "at 1.1 req/s, the highest rate measured and sustained by all" in comparison.latencies_at
    points = {p.configuration: p for p in RunFiles(demo).read_points() if p.phase == "ladder" and p.rate == 1.1}
    off = comparison.rows[OFF]["itl_p99"]
    assert_close(off.value, points[OFF].itl_p99_ms)
    assert_close(off.difference, 100 * (points[OFF].itl_p99_ms / points[ON].itl_p99_ms - 1))
    assert comparison.rows[ON]["itl_p99"].difference is None
    assert_close(comparison.rows[OFF]["rate"].value, 1.9 * 0.96)


def test_when_nothing_common_is_sustained_the_lowest_common_rate_is_taken(make_run: Callable[..., Path]) -> None:
    (comparison,) = compare(load([make_run("a", servers={"fast": Server(8), "slow": Server(1)})]))
    assert comparison.latencies_at == "at 2 req/s, not sustained by all"


def test_curves_without_a_common_rate_are_read_between_their_points(make_run: Callable[..., Path]) -> None:
    results = load([make_run("a"), make_run("b", servers={name: Server(s.capacity * 0.91) for name, s in TWO.items()})])
    (comparison,) = compare(results)
    assert comparison.latencies_at == "at 1.66 req/s, interpolated"
    curve = [d.point for d in results.series[f"a: {ON}", comparison.workload].curve]
    low = max((p for p in curve if p.rate <= 1.66), key=lambda p: p.rate)
    high = min((p for p in curve if p.rate >= 1.66), key=lambda p: p.rate)
    value = comparison.rows[f"a: {ON}"]["ttft_p99"].value
    assert value is not None
    assert low.ttft_p99_ms <= value <= high.ttft_p99_ms


def test_throughput_without_an_answers_own_figure_is_read_off_the_curve(demo: Path) -> None:
    files = RunFiles(demo)
    summary = files.read_summary()
    for answer in summary.answers:
        answer.output_tok_s = None
    files.write_summary(summary)
    series = load([demo]).series[ON, "shared-prefix 448+64/32"]
    assert_close(throughput(series), 4.4 * 0.96 * 32, 1e-4)


def test_a_configuration_that_sustains_nothing(demo: Path) -> None:
    files = RunFiles(demo)
    summary = files.read_summary()
    summary.answers[0].rate = None
    files.write_summary(summary)
    (comparison,) = compare(load([demo]))
    assert comparison.rows[ON]["rate"].value is None
    assert comparison.rows[OFF]["rate"].difference is None
    assert comparison.rows[OFF]["itl_p99"].difference is not None


def test_one_configuration_that_sustains_nothing_is_shown_at_its_lowest_rate(make_run: Callable[..., Path]) -> None:
    folder = make_run("a", servers={"one": Server(3)})
    files = RunFiles(folder)
    summary = files.read_summary()
    summary.answers[0].rate = None
    files.write_summary(summary)
    results = load([folder])
    (comparison,) = compare(results)
    assert comparison.latencies_at == "at 0.75 req/s, the lowest measured"
    assert comparison.rows["one"]["itl_p99"].value is not None
    assert comparison.rows["one"]["rate"].value is None
    assert points_at_one_rate(results.of_workload(comparison.workload))[1] == "at 0.75 req/s"


def slower(folder: Path, factor: float) -> None:
    edited(folder, lambda p: replace(p, itl_p99_ms=p.itl_p99_ms * factor))


@pytest.mark.parametrize(
    ("factor", "condition", "failures"),
    [
        (1.10, "itl_p99>+5%", 2),
        (1.04, "itl_p99>+5%", 0),
        (1.10, "itl_p99_ms > 5 %", 2),
        (0.80, "itl_p99<-5%", 2),
        (1.00, "rate<-0.1%", 0),
        (1.00, "rate<2", 1),
        (1.00, "ttft_p99>0.001s", 2),
        (1.00, "ttft_p99>100s", 0),
    ],
)
def test_conditions_judge_the_second_folder(
    make_run: Callable[..., Path], factor: float, condition: str, failures: int
) -> None:
    a, b = make_run("a"), make_run("b")
    slower(b, factor)
    failed = failed_conditions(load([a, b]), [condition])
    assert len(failed) == failures, failed
    assert all(line.startswith("b: ") for line in failed)


def test_within_one_folder_conditions_judge_against_the_first_configuration(demo: Path) -> None:
    (line,) = failed_conditions(load([demo]), ["rate<-10%"])
    assert line.startswith(f"{OFF} / shared-prefix")
    assert "−57 %" in line


def test_what_was_not_measured_fails_its_condition(make_run: Callable[..., Path]) -> None:
    a, b = make_run("a"), make_run("b")
    edited(b, lambda p: replace(p, itl_p99_ms=float("nan")))
    assert all("was not measured" in line for line in failed_conditions(load([a, b]), ["itl_p99>+5%"]))
    assert failed_conditions(load([a, b]), ["itl_p99>+5%"])


def test_goodput_is_compared_where_there_were_limits(make_run: Callable[..., Path]) -> None:
    a, b = make_run("a"), make_run("b")
    for folder, factor in ((a, 1.0), (b, 0.9)):
        edited(folder, lambda p, f=factor: replace(p, goodput=f * p.rate))
    (comparison,) = compare(load([a, b]))
    assert comparison.metrics[-1].key == "goodput"
    assert_close(comparison.rows[f"b: {ON}"]["goodput"].difference, -10.0, 1e-4)
    assert len(failed_conditions(load([a, b]), ["goodput<-5%"])) == 2
    assert failed_conditions(load([a, b]), ["goodput < -15 %", "goodput<0.5"]) == []


def test_energy_is_compared_where_it_was_measured(make_run: Callable[..., Path], demo: Path) -> None:
    for folder, power in zip((a := make_run("a"), b := make_run("b")), (600.0, 480.0), strict=True):
        edited(
            folder, lambda p, w=power: replace(p, mean_power_w=w, joules_per_output_token=w / p.output_tok_s)
        )  # fmt: skip
    comparison = compare(load([a, b]))[0]
    assert [m.key for m in comparison.metrics[-2:]] == ["joules_per_output_token", "mean_power_w"]
    row = comparison.rows[f"b: {ON}"]
    assert_close(row["mean_power_w"].value, 480)
    assert_close(row["joules_per_output_token"].difference, -20.0, 1e-4)
    assert len(failed_conditions(load([a, b]), ["joules_per_output_token<-10%"])) == 2
    assert "mean_power_w" not in [m.key for m in compare(load([demo]))[0].metrics]
    assert all("--energy-gpus" in line for line in failed_conditions(load([demo]), ["mean_power_w>500"]))


def test_goodput_without_limits_is_not_shown_and_fails_its_condition(demo: Path) -> None:
    results = load([demo])
    (comparison,) = compare(results)
    assert "goodput" not in [m.key for m in comparison.metrics]
    assert all("it needs limits (--slo" in line for line in failed_conditions(results, ["goodput<3"]))
    assert len(failed_conditions(results, ["goodput<3"])) == 2


def test_nothing_to_compare(make_run: Callable[..., Path]) -> None:
    with pytest.raises(ReportError, match="nothing to compare"):
        failed_conditions(load([make_run("a", servers={"one": Server(3)})]), ["rate<-5%"])


@given(
    metric=st.sampled_from([m.key for m in METRICS]),
    side=st.sampled_from("<>"),
    limit=st.integers(-999, 999),
    relative=st.booleans(),
)
def test_conditions_mean_what_they_say(metric: str, side: str, limit: int, relative: bool) -> None:
    condition = parse_condition(f"{metric} {side} {limit:+}{'%' if relative else ''}")
    assert (condition.metric.key, condition.above, condition.limit, condition.relative) == (
        metric,
        side == ">",
        limit,
        relative,
    )


@pytest.mark.parametrize("text", ["", "itl_p99", "speed>3", "itl_p99>", "itl_p99=5%", "rate>5ms", "itl_p99>5%%"])
def test_conditions_that_are_not_understood(text: str) -> None:
    with pytest.raises(ReportError, match="--fail-if"):
        parse_condition(text)
