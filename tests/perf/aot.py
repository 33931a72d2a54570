"""`make aot`: every Triton kernel compiled ahead of time for five targets, without a GPU.

For each kernel, dtype and target (see aot_cases.py) the registers of a thread, the bytes it spills, and the shared
memory of a program, from ptxas or LLVM's AMDGPU backend, in results/aot.json. Exit status 1: a kernel does not compile,
spills, or needs more shared memory than the target has. STORE=1 also writes tests/perf/aot-table.json, one row for
each kernel and target, which the suite compares with. ONLY=attend,sm_90 compiles the cases whose names contain all of
these words, in WORKERS=2 processes. A run that was ended continues where it was: results/aot-rows.jsonl has the rows of
cases that were compiled from the same source and constants.

What is compiled is not run: nothing here says how fast a kernel is.
"""

import hashlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from tests.perf.aot_cases import Case, cases
from tests.perf.child_processes import start_child

ROOT = Path(__file__).parents[2]
RESULTS, ROWS, TABLE = (
    ROOT / "results" / "aot.json",
    ROOT / "results" / "aot-rows.jsonl",
    Path(__file__).with_name("aot-table.json"),
)
# Shared memory of a program and of a multiprocessor, KiB: CUDA C++ Programming Guide, compute capabilities; AMD CDNA 3
# ISA, local data share. On NVIDIA a program takes 1 KiB besides its own.
SHARED_KIB = {"sm_80": (163, 164), "sm_90": (227, 228), "sm_100": (227, 228), "sm_120": (99, 100), "gfx942": (64, 64)}
WARPS = {"sm_80": 64, "sm_90": 64, "sm_100": 64, "sm_120": 48, "gfx942": 32}  # that a multiprocessor holds
REGISTERS = 65536  # of a multiprocessor of NVIDIA
STORED = ("tile", "registers", "spills", "shared_bytes")


def name_of(row: dict[str, Any]) -> str:
    return "|".join(row[key] for key in ("kernel", "variant", "dtype", "target"))


def resident(row: dict[str, Any]) -> int:
    """Programs that a multiprocessor runs at a time, by registers, shared memory and warps."""
    warps, registers, shared = row["warps"], max(-(-row["registers"] // 8) * 8, 8), row["shared_bytes"]
    if row["target"] == "gfx942":  # 512 registers for each lane of four vector units
        by_registers = 4 * min(512 // registers, 8) // warps
    else:
        by_registers = REGISTERS // (registers * 32) // 4 * 4 // warps
        shared += 1024
    by_shared = (SHARED_KIB[row["target"]][1] << 10) // max(shared, 1)
    return min(by_registers, by_shared, WARPS[row["target"]] // warps)


def compile_all(chosen: Sequence[Case], workers: int, report: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """A row for each case, compiled in `workers` processes; `report` gets each as it is done."""
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as cache:
        threads = [
            threading.Thread(target=_compile, args=(chosen[n::workers], cache, rows, report)) for n in range(workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    missing = [case.name for case in chosen if case.name not in rows]
    if missing:
        raise RuntimeError(f"the compiling process ended before {missing[0]} and {len(missing) - 1} more")
    return [rows[case.name] for case in chosen]


def _compile(
    chosen: Sequence[Case], cache: str, rows: dict[str, dict[str, Any]], report: Callable[[dict[str, Any]], None]
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_CACHE_DIR": cache}
    # Triton 3.10 turns the fusion of products and sums off by default.
    environment |= {"TRITON_DEFAULT_FP_FUSION": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.perf.aot_compile"]
    with start_child(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        process.stdin.write("\n".join(case.name for case in chosen))  # type: ignore[union-attr]
        process.stdin.close()  # type: ignore[union-attr]
        for line in process.stdout or ():
            row = json.loads(line)
            rows[name_of(row)] = row
            report(row)


def fault_of(row: dict[str, Any]) -> str | None:
    """Why a row fails."""
    if "error" in row:
        return str(row["error"])
    if row["spills"]:
        return f"spills {row['spills']} bytes"
    if row["shared_bytes"] > SHARED_KIB[row["target"]][0] << 10:
        return f"takes {row['shared_bytes']} bytes of shared memory, of {SHARED_KIB[row['target']][0]} KiB"
    return None


def show(rows: Sequence[dict[str, Any]]) -> None:
    columns = ("kernel", "variant", "dtype", "target", "tile", "registers", "spills", "shared_bytes", "resident")
    table = Table(title=f"Triton {triton.__version__}, compiled ahead of time")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right" if column in columns[5:] else "left")
    for row in rows:
        style = "red" if fault_of(row) else None
        table.add_row(*(str(row.get(column, "-")) for column in columns), style=style)
    Console(width=160).print(table)


def store(rows: Sequence[dict[str, Any]]) -> None:
    """Write the table that tests compare with, a line for each row."""
    kept = {name_of(row): [row[key] for key in STORED] for row in rows}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(values)}" for name, values in kept.items())
    head = f'"triton": "{triton.__version__}",\n"columns": {json.dumps(STORED)},\n'
    TABLE.write_text(f'{{{head}"rows": {{\n{lines}\n}}}}\n')


def mark_of(case: Case) -> str:
    """A hash of what decides the compiled kernel: Triton functions, constants, options, and the version of Triton."""
    own = sys.modules[case.function.fn.__module__]
    modules = {sys.modules[function.__module__] for function in _triton_functions(own)}
    functions = {function for module in modules for function in _triton_functions(module)}
    sources = sorted(inspect.getsource(function) for function in functions)
    decisive = (triton.__version__, case.name, case.types, case.constants, case.options, sources)
    return hashlib.sha256(repr(decisive).encode()).hexdigest()[:16]


def _triton_functions(module: ModuleType) -> list[Any]:
    """The functions of a module that Triton compiles, and those that it imports from others of ours."""
    found = [value.fn for value in vars(module).values() if hasattr(value, "fn")]
    return [function for function in found if function.__module__.startswith("engine.")]


class RowFile:
    """Rows of compiled cases by mark, a line each, written as they come."""

    def __init__(self, path: Path):
        self._path = path
        self.rows: dict[str, dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            kept = json.loads(line)
            self.rows[kept["mark"]] = kept["row"]
        path.parent.mkdir(exist_ok=True)

    def add(self, mark: str, row: dict[str, Any]) -> None:
        self.rows[mark] = row
        with self._path.open("a") as file:
            file.write(json.dumps({"mark": mark, "row": row}) + "\n")


def compile_missing(chosen: Sequence[Case], workers: int, kept: RowFile) -> list[dict[str, Any]]:
    """A row for each case; those that `kept` has are not compiled again."""
    marks = {case.name: mark_of(case) for case in chosen}
    missing = [case for case in chosen if marks[case.name] not in kept.rows]
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("compile", total=len(chosen), completed=len(chosen) - len(missing))

        def report(row: dict[str, Any]) -> None:
            if "error" not in row:
                kept.add(marks[name_of(row)], row)
            progress.advance(bar)
            if fault := fault_of(row):
                progress.console.print(f"{name_of(row)} ({row['tile']}) {fault}")

        made = {name_of(row): row for row in compile_all(missing, workers, report)} if missing else {}
    return [made.get(case.name) or kept.rows[marks[case.name]] for case in chosen]


def main() -> int:
    wanted = [word for word in os.environ.get("ONLY", "").split(",") if word]
    chosen = [case for case in cases() if all(word in case.name for word in wanted)]
    workers = int(os.environ.get("WORKERS", "2"))
    rows = compile_missing(chosen, workers, RowFile(ROWS))
    expected = {case.name: case.programs for case in chosen}
    for row in rows:
        if "error" not in row:
            row["resident"] = resident(row)
    show(rows)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")
    for row in rows:
        if (expected[name_of(row)] or 0) > row.get("resident", 99):
            print(f"{name_of(row)}: tiles.py expects {expected[name_of(row)]} programs, {row['resident']} fit")
    if os.environ.get("STORE"):
        store([row for case, row in zip(chosen, rows, strict=True) if case.stored])
    faults = [row for row in rows if fault_of(row)]
    print(f"{len(rows)} compiled in {sum(row.get('seconds', 0) for row in rows):.0f} s, {len(faults)} with faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
