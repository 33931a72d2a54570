"""`make parity`: compares every model family, served in several ways, with plain transformers.

Models have tiny random weights in float32 (shapes in tests/engine/worker/driver.py). Greedy tokens must be equal, and
log-probabilities of the whole vocabulary within the tolerance. Quantized checkpoints (llama/awq, …) are compared with
the model of the weights that they stand for, models with images or audio with the class that gets their tensors; there,
rows of mistakes on purpose pass if the comparison fails. FAMILIES=llama,qwen3 selects families. Prints tables and
writes results/parity.json; the exit code is 1 if a row failed.
"""

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from engine.config import EngineConfig
from engine.memory import resolve
from engine.model.model_info import read_model_info
from engine.worker.in_process import InProcessExecutor
from engine.worker.multiprocess import MultiprocessExecutor
from tests.engine.model.checkpoints.quantized_files import FORMATS, quantize
from tests.engine.worker import mm_parity
from tests.engine.worker.driver import MODELS, Driver, build_model
from tests.engine.worker.mm_models import MM_MODELS
from tests.engine.worker.parity import CASES, TOLERANCE, Reference, Row, compare, serve

RESULTS = Path("results") / "parity.json"
ROWS, BLOCK, BLOCKS = 6, 4, 2000
RANKS = "tp 2"
# Each function writes a checkpoint and returns transformers' model of its weights.
SOURCES: dict[str, Callable[[Path], Any]] = {
    **{kind: functools.partial(build_model, kind) for kind in sorted(MODELS)},
    **{f"llama/{form}": functools.partial(quantize, form=form) for form in FORMATS},
}


def start(folder: Path, ranks: int) -> Driver:
    config = EngineConfig(
        model=str(folder), tensor_parallel_size=ranks, dtype="float32", max_num_seqs=ROWS, block_size=BLOCK,
        kernels="torch",
    )  # fmt: skip
    model_info = read_model_info(config)
    pool = model_info.kv_bytes_per_token * BLOCK * BLOCKS
    resolved = dataclasses.replace(
        resolve(dataclasses.replace(config, kv_cache_memory_bytes=pool), model_info).config, num_blocks=BLOCKS
    )
    executor = (MultiprocessExecutor if ranks > 1 else InProcessExecutor)(config, model_info, resolved)
    windows = resolved.kv_windows
    return Driver(executor, rows=ROWS, block_size=BLOCK, num_blocks=BLOCKS, windows=windows)  # type: ignore[arg-type]


def rows_of(kind: str, folder: Path) -> Iterator[Row]:
    """The rows of a family; a case that raises is a failed row."""
    if kind in MM_MODELS:
        with contextlib.redirect_stderr(io.StringIO()):
            yield from mm_parity.rows_of(kind, MM_MODELS[kind], folder)
            yield from mm_parity.fused_rows(kind, MM_MODELS[kind], folder / "fused")
        return
    with contextlib.redirect_stderr(io.StringIO()):  # transformers' progress bars
        reference = Reference(SOURCES[kind](folder))
    for ranks, cases in ((1, CASES), (2, (RANKS,))):
        driver = start(folder, ranks)
        try:
            for case in cases:
                try:
                    yield compare(kind, case, serve(driver, "preempted" if case == RANKS else case), reference)
                except AssertionError as error:
                    yield Row(kind, case, False, float("nan"), str(error))
        finally:
            driver.executor.shutdown()


def show(rows: list[Row]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150)
    text = [row for row in rows if row.family not in MM_MODELS]
    show_table(console, text, (*CASES, RANKS))
    show_table(
        console, [row for row in rows if row.family in MM_MODELS],
        (*mm_parity.CASES, mm_parity.RANKS, *mm_parity.CONTROLS, mm_parity.FUSED, mm_parity.FUSED_RANKS),
    )  # fmt: skip
    for row in rows:
        if not row.passed or row.note:
            console.print(f"{'✓' if row.passed else '✗'} {row.family}, {row.case}: {row.note}")


def show_table(console: Console, rows: list[Row], cases: tuple[str, ...]) -> None:
    if not rows:
        return
    table = Table(title=f"Largest difference of a log-probability (tolerance {TOLERANCE:g}); tokens equal where ✓")
    for name in ("family", *cases):
        table.add_column(name, justify="left" if name == "family" else "right")
    found = {(row.family, row.case): row for row in rows}
    for family in dict.fromkeys(row.family for row in rows):
        some = [found.get((family, case)) for case in cases]
        table.add_row(family, *map(cell, some))
    console.print(table)


def cell(row: Row | None) -> str:
    """A row in the table; the reason why a case is not applicable is printed below it."""
    if row is None:
        return ""
    if math.isnan(row.max_logit_difference):
        return "not applicable" if row.passed else "✗"
    return f"{row.max_logit_difference:.1e} {'✓' if row.passed else '✗'}"


def main() -> int:
    wanted = os.environ.get("FAMILIES", "")
    known = [*SOURCES, *MM_MODELS]
    kinds = wanted.split(",") if wanted else known
    unknown = sorted(set(kinds) - set(known))
    if unknown:
        raise SystemExit(f"make parity: FAMILIES must be of {', '.join(known)}, not {', '.join(unknown)}")
    rows: list[Row] = []
    for kind in track(kinds, "parity", console=Console(stderr=True), disable=not sys.stderr.isatty()):
        with tempfile.TemporaryDirectory() as folder:
            rows += rows_of(kind, Path(folder))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    show(rows)
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
