"""Tools around the kernels: what the compiler makes of them, which tiles are fastest, and a memory checker."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tests.gpu.environment import Environment
from tests.gpu.rows import SkipError

if TYPE_CHECKING:
    from engine.worker.tile_tuning import Choice

SANITIZER_S = 55.0


def resources(env: Environment) -> None:
    """All kernels of the stored table compiled by this machine's Triton: no spills, registers as stored."""
    from tests.perf import aot
    from tests.perf.aot_cases import cases

    target = "sm_90" if env.stand_in else env.target
    chosen = [case for case in cases() if case.stored and case.target == target]
    chosen = chosen[:2] if env.stand_in else chosen
    rows = aot.compile_all(chosen, min(16, os.cpu_count() or 1), lambda row: None)
    stored = json.loads(aot.TABLE.read_text())
    for row in rows:
        fault, name = aot.fault_of(row), f"{row['kernel']} {row['variant']} {row['dtype']}"
        before = dict(zip(stored["columns"], stored["rows"][aot.name_of(row)], strict=True))
        note = fault or f"{row['tile']}, {row['shared_bytes']} bytes shared; stored: {before['registers']} registers"
        env.report.row(name, row.get("registers"), "registers", passed=fault is None, note=note)


def tiles(env: Environment) -> None:
    """The tiles that `redline profile --tune` chooses for the model, beside the built-in ones."""
    if env.stand_in:
        raise SkipError("tiles are measured on a GPU")
    from engine.worker.tuning_run import tune_gpu, tuned_shape_of_model

    tuned = tuned_shape_of_model(str(env.model_folder()), None, 32, quantized=False)
    table, choices = tune_gpu(tuned, env.folder / "tiles.yaml", lambda done, total, text: None)
    report_choices(env, choices)
    env.report.row("table", f"{len(table.tiles)} tiles", detail=table.plain())


def report_choices(env: Environment, choices: "Mapping[Any, Choice]") -> None:
    for launch, choice in choices.items():
        for workload, (builtin, chosen) in choice.seconds.items():
            note = f"{choice.tile}, {choice.measured} measured; built-in {builtin * 1e6:.1f} µs, {choice.builtin}"
            env.report.row(f"{launch}, {workload}", chosen * 1e6, "µs", note=note)


def sanitizer(env: Environment) -> None:
    """The kernels' own cases under compute-sanitizer's memcheck, where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise SkipError("compute-sanitizer is not installed")
    command = [tool, "--error-exitcode", "9", sys.executable, "-m", "tests.gpu.child", "--folder", str(env.folder)]
    command += ["kernels: attention variants"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SANITIZER_S, check=False)
    except subprocess.TimeoutExpired:
        raise SkipError(f"memcheck was not done after {SANITIZER_S:.0f} s") from None
    summary = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
    env.report.row("memcheck", " ".join(summary)[:200] or f"exit status {done.returncode}", passed=done.returncode == 0)
