import io

from rich.console import Console

from bench.measurement.load_point import PointPlan, PointState
from bench.measurement.progress import ConsoleProgress, SweepProgress, point_line, points_table
from bench.search.windows import Timing
from tests.bench.records import plain_point

PLAN = PointPlan(4.0, "search", 0, Timing(1.0, 10.0, 5.0), 1.0, cut_overload=True)
STATE = PointState(3.0, 12, 10, 8, 0, None)


def shown(*parts: object) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(*parts)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_failures_and_goodput_have_columns_only_where_there_are_any() -> None:
    plain = shown(points_table([plain_point()]))
    assert "failed" not in plain
    assert "goodput" not in plain
    full = shown(
        points_table([plain_point(rate=7.0, failures="connection:3;http 429:12", goodput=6.51), plain_point()])
    )
    row = next(line for line in full.splitlines() if line.startswith("    7"))
    assert row.split()[-2:] == ["6.51", "15"]
    assert next(line for line in full.splitlines() if line.startswith("    1")).split()[-2:] == ["–", "0"]


def test_energy_has_columns_only_where_it_was_measured() -> None:
    assert "J/token" not in shown(points_table([plain_point()]))
    full = shown(points_table([plain_point(mean_power_w=612.4, joules_per_output_token=0.3128), plain_point(rate=2.0)]))
    first, second = (next(line for line in full.splitlines() if line.startswith(f"    {rate}")) for rate in (1, 2))
    assert first.split()[-2:] == ["0.313", "612"]
    assert second.split()[-2:] == ["–", "–"]


def test_a_terminal_shows_the_table_of_runs_and_the_point_under_way() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with SweepProgress(console, ["on", "off"], {key: ["on", "off"] for key in ["500/2000", "2048/128"]}) as progress:
        progress.run_state("on", "500/2000", "search: starting the server")
        progress.point_started(PLAN)
        assert "search 4 req/s" in shown(progress.table())
        progress.point_tick(PLAN, STATE)
        progress.point_finished(plain_point(rate=4.0))
        progress.run_state("on", "500/2000", "sustains 4 req/s (3.8–4.2)")
        progress.run_state("off", "500/2000", "failed: no memory")
    live = console.file.getvalue()  # type: ignore[attr-defined]
    assert "3 of 11 s" in live
    assert "starting the server" in live
    rows = shown(progress.table()).splitlines()
    assert [row.split("  ")[0].strip() for row in rows[1:]] == ["on", "off"]
    assert "sustains 4 req/s (3.8–4.2)" in rows[1]
    assert "failed: no memory" in rows[2]
    assert sum(row.count("waiting") for row in rows) == 2


def test_a_closed_loop_counts_its_requests() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    progress = ConsoleProgress(console)
    plan = PointPlan(
        1.0, "closed", 0, Timing(0.0, 1e9, 0.0), 0.0, cut_overload=False, concurrency=16, requests=64
    )  # fmt: skip
    progress.point_started(plan)
    progress.point_tick(plan, PointState(3.2, 40, 38, 22, 2, None))
    row = plain_point(phase="closed", sustained=None, concurrency=16, reason="16 at a time")
    progress.point_finished(row)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "concurrency 16 · 24 of 64 requests · 3 s" in said
    assert "failed 2" in said
    assert point_line(row).plain.startswith("· closed")
    assert point_line(plain_point(phase="closed", sustained=None, concurrency=16, valid=False)).plain.startswith("? ")


def test_a_pipe_gets_one_line_a_point() -> None:
    for progress_of in (ConsoleProgress, lambda console: SweepProgress(console, ["c"], {"20/5": ["c"]})):
        console = Console(file=io.StringIO(), width=200)
        progress = progress_of(console)
        progress.run_state("c", "20/5", "search")
        progress.point_started(PLAN)
        progress.point_tick(PLAN, STATE)
        progress.point_finished(plain_point(reason="backlog steady"))
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert len(lines) == 1
        assert "backlog steady" in lines[0]
