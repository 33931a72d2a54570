"""All items of the GPU check run without an error on the stand-in; speed has no bars there."""

import io
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.child import run_items
from tests.gpu.model_items import by_time, idle_share, spans_of
from tests.gpu.rows import MARK, Reporter, Row, line
from tests.gpu.serve_items import highest_sustained


def run(folder: Path, *items: str) -> list[Row]:
    """The rows of items, none of which failed."""
    out = io.StringIO()
    assert run_items(list(items), folder, True, out) == 0
    rows = [Row(**json.loads(text.removeprefix(MARK))) for text in out.getvalue().splitlines()]
    assert [row.item for row in rows if row.measured == "end"] == list(items)
    rows = [row for row in rows if row.measured != "end"]
    failed = [line(row) for row in rows if row.passed is False]
    assert not failed
    return rows


def test_the_device_and_the_model(tmp_path: Path) -> None:
    rows = run(tmp_path, "facts", "load", "steps", "attention speed", "idle", "profile")
    named = {row.name: row for row in rows}
    assert named["card"].measured.startswith("stand-in")  # type: ignore[union-attr]
    assert named["kernels"].measured == "triton, fused stack"
    assert named["decode, 3 rows after 20"].measured > 0  # type: ignore[operator]
    assert "roofline" in named["decode, 3 rows after 20"].note
    assert {"mixed, 1 rows and a chunk, 8 tokens", "prefill, 40 tokens"} <= set(named)


def test_kernels_are_right_and_have_the_same_bits_twice(tmp_path: Path) -> None:
    rows = run(tmp_path, "kernels: norm and activation", "kernels: products")
    assert {row.measured for row in rows} == {"right"}
    assert len(rows) == 21


def test_a_rank_that_is_alone(tmp_path: Path) -> None:
    named = {row.name: row for row in run(tmp_path, "ranks")}
    assert named["join"].note == "GlooGroup"
    assert named["captured sum and gather of one rank"].measured == "right"


def test_kv_blocks_go_to_host_memory_and_back(tmp_path: Path) -> None:
    named = {row.name: row for row in run(tmp_path, "KV blocks")}
    assert named["bytes in host memory"].measured == named["bytes on the device"].measured == "right"


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["rotary and cache", "attention", "attention variants", "8-bit caches", "sampling"])
def test_other_kernels_are_right(kind: str, tmp_path: Path) -> None:
    assert {row.measured for row in run(tmp_path, f"kernels: {kind}")} == {"right"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_families_equal_transformers(kind: str, tmp_path: Path) -> None:
    rows = run(tmp_path, f"parity: {kind}")
    assert [row.name for row in rows][:2] == ["chunked", "run-ahead, eager"]


@pytest.mark.exhaustive
def test_what_starts_other_processes(tmp_path: Path) -> None:
    rows = run(
        tmp_path, "out of memory", "serve: 500/200, 64 at a time", "serve: 2048/128", "resources", "tiles", "sanitizer"
    )
    named = {(row.item, row.name): row for row in rows}
    assert named["serve: 500/200, 64 at a time", "2 at a time"].measured > 0  # type: ignore[operator]
    assert ("serve: 2048/128", "highest sustained of these rates") in named
    assert "--kv-cache-memory-bytes" in str(named["out of memory", "a cache of 1 PiB"].measured)


def test_an_item_that_fails_is_a_row(tmp_path: Path) -> None:
    out = io.StringIO()
    run_items(["kernels: no such kind", "serve: 6000/4000"], tmp_path, True, out)
    rows = [Row(**json.loads(text.removeprefix(MARK))) for text in out.getvalue().splitlines()]
    assert [(row.name, row.passed) for row in rows] == [("error", False), ("", None), ("skipped", None), ("", None)]
    assert "no such kind" in rows[0].note


def test_tiles_are_reported_beside_the_built_in_ones(tmp_path: Path) -> None:
    from engine.kernels.tile_table import Tile
    from engine.worker.tile_tuning import Choice, Workload
    from tests.gpu.environment import Environment
    from tests.gpu.tool_items import report_choices

    workload = Workload(rows=64, new=1, context=4096)
    choice = Choice(Tile(16, 64, 4, 3, 3), Tile(16, 32, 4, 3, 3), {workload: (3e-4, 2e-4)}, 12)
    out = io.StringIO()
    report_choices(Environment(tmp_path, True, Reporter("tiles", out)), {"decode": choice})
    row = Row(**json.loads(out.getvalue().removeprefix(MARK)))
    assert row.measured == pytest.approx(200)
    assert "12 measured; built-in 300.0 µs" in row.note


def test_bars() -> None:
    out = io.StringIO()
    report = Reporter("one", out)
    report.row("a", 2.0, "ms", at_most=2.0)
    report.row("b", 2.0, "ms", at_most=1.0)
    report.row("c", 2.0, at_least=1.0, at_most=3.0)
    report.row("d", "words")
    rows = [Row(**json.loads(text.removeprefix(MARK))) for text in out.getvalue().splitlines()]
    assert [(row.bar, row.passed) for row in rows] == [
        ("≤ 2", True), ("≤ 1", False), ("≤ 3 and ≥ 1", True), ("", None),
    ]  # fmt: skip
    assert line(rows[1]) == "FAILED  one: b: 2 ms (≤ 1)"


def test_the_idle_share_of_kernels_that_overlap() -> None:
    assert idle_share([(0, 10), (2, 5), (20, 30), (5, 12)]) == pytest.approx(8 / 30)
    assert idle_share([(4, 9)]) == 0


def test_kernels_by_their_time() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(2):
            torch.mm(torch.ones(200, 200), torch.ones(200, 200))
    spans = spans_of(profiler, torch.autograd.DeviceType.CPU)
    named = dict(by_time(spans, steps=2))
    assert named["aten::mm"][1] == 1
    assert 0 <= idle_share([(one["begin"], one["end"]) for one in spans]) < 1


def test_the_highest_sustained_rate() -> None:
    points = [{"rate": rate, "sustained": word} for rate, word in (("8", "true"), ("13", "true"), ("15", "false"))]
    assert highest_sustained(points) == 13
    assert highest_sustained(points[2:]) == 0
