"""Kernels compiled ahead of time, against the stored table of registers and shared memory."""

import importlib
import json
import pkgutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

import engine.kernels.triton as kernels  # noqa: E402
from tests.perf import aot  # noqa: E402
from tests.perf.aot_cases import TARGETS, cases  # noqa: E402

STORED: dict[str, Any] = json.loads(aot.TABLE.read_text())
# A small part, for each target one; `make aot` compiles all.
COMPILED = (
    "slot_state.gather_ids||int32|sm_80",
    "attention.attend decode|dim 128|bf16|sm_90",
    "activation.gated|silu|bf16|sm_100",
    "sampling.pick||bf16|sm_120",
    "norm.rms_norm|hidden 4096|bf16|gfx942",
)
MORE_REGISTERS = 8  # than stored: a change of that size is to be looked at


def test_every_kernel_has_cases_for_every_target() -> None:
    covered = {(case.function.fn, case.target) for case in cases()}
    modules = [
        importlib.import_module(f"{kernels.__name__}.{found.name}") for found in pkgutil.iter_modules(kernels.__path__)
    ]
    found = {
        value.fn
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "fn")
    }
    assert len(found) >= 15
    assert covered == {(function, target) for function in found for target in TARGETS}


def test_arguments_of_cases_are_those_of_their_kernels() -> None:
    for case in cases():
        assert set(case.constants) <= set(case.function.arg_names), case.name
        assert not set(case.constants) & set(case.types), case.name


def test_names_of_cases_are_unique() -> None:
    names = [case.name for case in cases()]
    assert len(names) == len(set(names))


def test_nothing_in_the_table_spills_or_exceeds_shared_memory() -> None:
    tiles = {case.name: case.tile for case in cases() if case.stored}
    assert {(case.function.fn, case.target) for case in cases()} == {
        (case.function.fn, case.target) for case in cases() if case.stored
    }
    assert set(STORED["rows"]) == set(tiles), "make aot STORE=1 writes the table"
    for name, values in STORED["rows"].items():
        row = dict(zip(STORED["columns"], values, strict=True)) | {"target": name.split("|")[3]}
        assert row["tile"] == tiles[name], f"{name}: make aot STORE=1 writes the table"
        assert aot.fault_of(row) is None, name


@pytest.mark.skipif(triton.__version__ != STORED["triton"], reason=f"the table is of Triton {STORED['triton']}")
def test_compiled_kernels_take_what_the_table_says() -> None:
    chosen = [case for case in cases() if case.name in COMPILED]
    rows = aot.compile_all(chosen, 1, lambda row: None)
    assert {aot.name_of(row) for row in rows} == set(COMPILED)
    for row in rows:
        stored = dict(zip(STORED["columns"], STORED["rows"][aot.name_of(row)], strict=True))
        assert aot.fault_of(row) is None
        assert (row["tile"], row["shared_bytes"]) == (stored["tile"], stored["shared_bytes"])
        assert row["registers"] <= stored["registers"] + MORE_REGISTERS


def test_programs_of_a_multiprocessor_by_registers_and_shared_memory() -> None:
    row = {"target": "sm_90", "warps": 4, "registers": 168, "shared_bytes": 39 << 10}
    assert aot.resident(row) == 3
    assert aot.resident(row | {"shared_bytes": 100 << 10}) == 2
    assert aot.resident(row | {"registers": 16, "shared_bytes": 0}) == 16
    assert aot.resident(row | {"target": "gfx942", "registers": 235, "shared_bytes": 33 << 10}) == 1


def test_faults_of_a_row() -> None:
    row = {"target": "sm_120", "spills": 0, "shared_bytes": 99 << 10}
    assert aot.fault_of(row) is None
    assert aot.fault_of(row | {"shared_bytes": (99 << 10) + 1}) == "takes 101377 bytes of shared memory, of 99 KiB"
    assert aot.fault_of(row | {"spills": 4}) == "spills 4 bytes"
    assert aot.fault_of(row | {"error": "PTXASError"}) == "PTXASError"


def test_a_run_that_was_ended_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = cases()[:3]
    rows = [
        {"kernel": case.kernel, "variant": case.variant, "dtype": case.dtype, "target": case.target, "tile": case.tile,
         "spills": 0, "shared_bytes": 0}
        for case in chosen
    ]  # fmt: skip
    path = tmp_path / "results" / "rows.jsonl"
    aot.RowFile(path).add(aot.mark_of(chosen[0]), rows[0])
    compiled: list[str] = []

    def compile_all(missing: Any, workers: int, report: Any) -> list[dict[str, Any]]:
        compiled.extend(case.name for case in missing)
        found = [row for row in rows if aot.name_of(row) in compiled]
        for row in found:
            report(row)
        return found

    monkeypatch.setattr(aot, "compile_all", compile_all)
    assert aot.compile_missing(chosen, 1, aot.RowFile(path)) == rows
    assert compiled == [case.name for case in chosen[1:]]
    assert set(aot.RowFile(path).rows) == {aot.mark_of(case) for case in chosen}
    changed = replace(chosen[0], constants=chosen[0].constants | {"ROWS": 3})
    assert aot.mark_of(changed) not in aot.RowFile(path).rows
