from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from bench.results import RunFiles
from plots.data import Results, load
from plots.latency import caption, latency_figure
from plots.style import COLORS, needs_log_scale, palette, plain, save, span, wrapped
from plots.throughput import throughput_figure
from tests.plots.made import ARTICLES, TWO, Server, edited

WORKLOAD = "shared-prefix 448+64/32"


def lone_markers(axes: Axes) -> list:
    return [line for line in axes.lines if len(line.get_xdata()) == 1 and line.get_marker() not in ("None", "|", "_")]


def shown_texts(figure: Figure) -> list[Text]:
    """All text that a reader sees: matplotlib keeps labels of ticks beyond the ends of an axis, undrawn."""
    FigureCanvasAgg(figure).draw()
    unseen = set()
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            unseen |= {id(tick.label1) for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    return [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible() and id(t) not in unseen]


def assert_nothing_clipped(figure: Figure) -> None:
    texts = shown_texts(figure)
    width, height = figure.bbox.size
    for text in texts:
        box = text.get_window_extent()
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        assert inside, f"{text.get_text()!r} leaves the figure: {box}"


def assert_apart(figure: Figure) -> None:
    """No two lines of text on top of each other."""
    boxes = [(t.get_text(), t.get_window_extent().padded(-1.5)) for t in shown_texts(figure)]
    for i, (one, box) in enumerate(boxes):
        for other, beside in boxes[i + 1 :]:
            assert not box.overlaps(beside), f"{one!r} and {other!r} overlap"


def test_one_line_a_configuration_hollow_where_not_sustained(demo: Path) -> None:
    results = load([demo])
    figure = latency_figure(results, WORKLOAD)
    drawn = [d for s in results.of_workload(WORKLOAD) for d in s.curve]
    for axes in figure.axes:
        curves = [line for line in axes.lines if len(line.get_xdata()) > 2]
        assert [to_hex(line.get_color()) for line in curves] == list(COLORS[:2])
        markers = lone_markers(axes)
        assert len(markers) == len(drawn)
        hollow = sum(to_hex(m.get_markerfacecolor()) == "#ffffff" for m in markers)
        assert hollow == sum(not d.point.sustained for d in drawn) > 0


def test_a_short_window_does_not_overrule_the_search(demo: Path) -> None:
    edited(demo, lambda p: replace(p, sustained=True))
    series = load([demo]).series["prefix caching off", WORKLOAD]
    assert series.answer is not None
    assert series.answer.high is not None
    judged = {d.point.rate: series.sustained(d.point) for d in series.curve}
    assert judged == {rate: rate < series.answer.high for rate in judged}
    edited(demo, lambda p: replace(p, provisional=False))
    series = load([demo]).series["prefix caching off", WORKLOAD]
    assert all(series.sustained(d.point) for d in series.curve)


def test_the_highest_sustained_rates_are_marked_and_named(demo: Path) -> None:
    results = load([demo])
    figure = latency_figure(results, WORKLOAD)
    rates = {round(s.answer.rate, 6) for s in results.of_workload(WORKLOAD) if s.answer}
    for axes in figure.axes:
        dashed = {round(line.get_xdata()[0], 6) for line in axes.lines if line.get_linestyle() == "--"}
        assert dashed == rates
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words[0] == "prefix caching on  ·  sustains 4.22 req/s (3.93–4.56, provisional)"


def test_disturbed_points_are_ringed(demo: Path) -> None:
    def rings(figure: Figure) -> list[int]:
        return [sum(line.get_markersize() == 12 for line in axes.lines) for axes in figure.axes]

    assert rings(latency_figure(load([demo]), WORKLOAD)) == [0, 0]
    assert "Ring:" not in footer(latency_figure(load([demo]), WORKLOAD))
    low = min(d.point.rate for s in load([demo]).of_workload(WORKLOAD) for d in s.curve)
    edited(demo, lambda p: replace(p, disturbed=p.rate == low, others_cpu_share=0.3))
    results = load([demo])
    marked = sum(d.point.disturbed for s in results.of_workload(WORKLOAD) for d in s.curve)
    figure = latency_figure(results, WORKLOAD)
    assert rings(figure) == [marked, marked]
    assert marked > 0
    assert "Ring: disturbed (other processes used more than 10 % of the cores)" in footer(figure)


def test_an_undisturbed_point_of_a_rate_comes_first(demo: Path) -> None:
    series = load([demo]).series["prefix caching on", WORKLOAD]
    first = series.curve[0].point
    files = RunFiles(demo)
    files.write_points([*files.read_points(), replace(first, point_id="again", itl_p99_ms=1.0, disturbed=True)])
    assert load([demo]).series["prefix caching on", WORKLOAD].curve[0].point.point_id == first.point_id


@pytest.mark.parametrize(("requests", "on_itl", "on_ttft"), [(80, False, True), (25, True, True), (1100, False, False)])
def test_whiskers_where_a_p99_has_few_samples(
    make_run: Callable[..., Path], requests: int, on_itl: bool, on_ttft: bool
) -> None:
    results = load([make_run("a", requests=requests)])
    figure = latency_figure(results, WORKLOAD)
    drawn = sum(len(s.curve) for s in results.of_workload(WORKLOAD))
    assert [len(axes.containers) for axes in figure.axes] == [drawn * on_itl, drawn * on_ttft]
    assert ("Whiskers" in footer(figure)) == (on_itl or on_ttft)


def footer(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.texts)


def test_the_figure_says_what_was_run(demo: Path) -> None:
    said = footer(latency_figure(load([demo]), WORKLOAD))
    samples = "80 requests, 2,480 inter-token gaps"
    for fact in ("smollm2-135m", "Intel Xeon", "2 cores", samples, "Seed 1", "redline 0.1.0"):
        assert fact in said
    assert "Provisional" in said


def test_random_weights_are_said(demo: Path) -> None:
    files = RunFiles(demo)
    summary = files.read_summary()
    for configuration in summary.configurations.values():
        configuration["serve"]["load_format"] = "dummy"
    files.write_summary(summary)
    assert "smollm2-135m (random weights)" in footer(latency_figure(load([demo]), WORKLOAD))


def test_invalid_points_are_counted_in_a_note(demo: Path) -> None:
    edited(demo, lambda p: replace(p, valid=False, sustained=None) if p.phase == "confirm" else p)
    assert "2 invalid load points omitted" in footer(latency_figure(load([demo]), WORKLOAD))


def test_a_figure_without_a_valid_point_says_so(demo: Path) -> None:
    edited(demo, lambda p: replace(p, valid=False, sustained=None))
    figure = latency_figure(load([demo]), WORKLOAD)
    assert all("nothing measured" in [t.get_text() for t in axes.texts] for axes in figure.axes)


def test_latencies_that_are_not_numbers_are_not_drawn(demo: Path) -> None:
    edited(demo, lambda p: replace(p, itl_p99_ms=float("nan")))
    itl, ttft = latency_figure(load([demo]), WORKLOAD).axes
    assert not lone_markers(itl)
    assert lone_markers(ttft)


def test_wide_spreads_get_a_log_axis(demo: Path) -> None:
    itl, ttft = latency_figure(load([demo]), WORKLOAD).axes
    assert (itl.get_yscale(), ttft.get_yscale()) == ("linear", "log")
    assert not needs_log_scale([1, 2, 11])
    assert needs_log_scale([1, 13])
    assert not needs_log_scale([])


def many(make_run: Callable[..., Path]) -> Results:
    servers = {f"v1 with option {letter}": Server(3 + i, 60 + 5 * i) for i, letter in enumerate("ABCDEF")}
    return load([make_run("a", servers=servers, workloads=ARTICLES)])


def test_text_is_legible(make_run: Callable[..., Path], demo: Path) -> None:
    """With two configurations and with six: nothing clipped, nothing on top of other text."""
    for results in (load([demo]), many(make_run)):
        for figure in (latency_figure(results, results.workloads[0]), throughput_figure(results)):
            assert_nothing_clipped(figure)
            assert_apart(figure)


def test_colours_stay_with_their_configuration(make_run: Callable[..., Path]) -> None:
    results = many(make_run)
    looks = palette(results.configurations)
    assert len(set(looks.values())) == 6
    bars = throughput_figure(results).axes[0].containers
    drawn = [to_hex(bar[0].get_facecolor()) for bar in bars]
    assert drawn == [looks[c][0] for c in results.configurations for _ in results.workloads]


def test_bars_carry_values_and_differences(demo: Path) -> None:
    axes = throughput_figure(load([demo])).axes[0]
    said = [text.get_text() for text in axes.texts]
    assert said == ["135", "58.4", "−57 %"]
    assert [label.get_text() for label in axes.get_xticklabels()] == [WORKLOAD]


def test_a_bar_for_nothing_sustained(demo: Path) -> None:
    files = RunFiles(demo)
    summary = files.read_summary()
    summary.answers[1].rate = None
    files.write_summary(summary)
    said = [text.get_text() for text in throughput_figure(load([demo])).axes[0].texts]
    assert said == ["135", "none\nsustained"]


def test_pictures_are_wide_enough_for_a_readme(demo: Path, tmp_path: Path) -> None:
    png, svg = save(latency_figure(load([demo]), WORKLOAD), tmp_path / "pictures" / "a.png")
    assert imread(png).shape[1] == 2000
    assert svg.read_text().lstrip().startswith("<?xml")


def test_the_same_results_give_the_same_picture(demo: Path, tmp_path: Path) -> None:
    pictures = [save(latency_figure(load([demo]), WORKLOAD), tmp_path / f"{i}.png") for i in range(2)]
    assert pictures[0][1].read_bytes() == pictures[1][1].read_bytes()


def test_captions_fit_their_figure(demo: Path) -> None:
    assert all(len(line) <= 168 for line in caption(load([demo]), WORKLOAD))
    assert wrapped(["a" * 100, "b" * 100, "c"]) == ["a" * 100, "b" * 100 + "  ·  c"]
    assert [len(line) for line in wrapped(["word " * 50])] == [164, 84]


def test_numbers_as_people_write_them() -> None:
    assert [plain(v) for v in (0.25, 4.2, 31, 1240)] == ["0.25", "4.2", "31", "1,240"]
    assert span([40, 40]) == "40"
    assert span([1200, 40]) == "40–1,200"
    assert set(TWO) == {"prefix caching on", "prefix caching off"}


def test_long_numbers_leave_room_for_the_label_of_their_axis(demo: Path) -> None:
    files = RunFiles(demo)
    summary = files.read_summary()
    for answer in summary.answers:
        answer.output_tok_s = 12_345.0
    files.write_summary(summary)
    assert_nothing_clipped(throughput_figure(load([demo])))
