"""The GPU check goes on after a failure, a fault and an item that hangs, and writes each result at once."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.gpu.check import STAGES, Check, Group, gpu_or_reason, main
from tests.gpu.child import DEVICE_FAULT
from tests.gpu.rows import MARK, Row, is_device_fault

# Prints a row for each item. Items that are called "fault" or "die" end the process, "hang" never ends.
CHILD = f"""
import json, os, sys, time
print("a word of a library", flush=True)
for item in sys.argv[1:]:
    if item == "die":
        os._exit(1)
    if item == "hang":
        time.sleep(60)
    row = {json.dumps(asdict(Row("", "figure", 1.5, "ms", "≤ 2", True)))!r}
    row = json.loads(row) | {{"item": item}}
    if item == "fault":
        row |= {{"name": "error", "passed": False}}
    print({MARK!r} + json.dumps(row), flush=True)
    print({MARK!r} + json.dumps(row | {{"name": "", "measured": "end"}}), flush=True)
    if item == "fault":
        os._exit({DEVICE_FAULT})
"""


class FakeCheck(Check):
    """Runs the program above as a child."""

    def command(self, items: Sequence[str], folder: str) -> list[str]:
        return [sys.executable, "-c", CHILD, *items]


def run(out: Path, *groups: Group, limit_s: float = 60) -> list[Row]:
    check = FakeCheck(out, 1, limit_s, stand_in=False)
    check.run(groups)
    return check.rows


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "new")], find=lambda: "no NVIDIA driver was found") == 0
    assert capsys.readouterr().out == "gpu-check: no GPU to check (no NVIDIA driver was found)\n"
    assert not (tmp_path / "new").exists()


def test_this_machine_is_asked() -> None:
    import torch

    assert bool(gpu_or_reason()) != torch.cuda.is_available()


def test_items_follow_a_fault_a_death_and_a_hang(tmp_path: Path) -> None:
    rows = run(tmp_path, Group((("one", "fault", "two", "die", "three"),), 50), Group((("hang", "four"),), 7))
    assert [(row.item, row.passed) for row in rows] == [
        ("one", True), ("fault", False), ("two", True), ("die", False), ("three", True), ("hang", False),
        ("four", None),
    ]  # fmt: skip
    assert "the process ended before the item did" in rows[3].note
    assert "not done after" in rows[5].note
    assert "no time left" in rows[6].note


def test_files_are_whole_after_each_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.gpu import check

    written, write = [], check.write_files

    def noted(folder: Path, *arguments: object) -> None:
        write(folder, *arguments)  # type: ignore[arg-type]
        written.append(len(json.loads((folder / "gpu-check.json").read_text())["rows"]))

    monkeypatch.setattr(check, "write_files", noted)
    run(tmp_path, Group((("one", "two"), ("three",)), 50))
    assert written == [1, 2, 3]
    lines = (tmp_path / "gpu-check.md").read_text().splitlines()
    assert "| one | figure | 1.5 ms | ≤ 2 | passed |  |" in lines


def test_nothing_starts_after_the_limit(tmp_path: Path) -> None:
    rows = run(tmp_path, Group((("one",),), 50), limit_s=1)
    assert [(row.name, row.passed) for row in rows] == [("skipped", None)]


@pytest.mark.parametrize(
    ("text", "is_fault"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: unspecified launch failure", True),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", False),
        ("out of resource: shared memory, Required: 300000", False),
    ],
)
def test_after_which_errors_a_new_process_is_needed(text: str, is_fault: bool) -> None:
    assert is_device_fault(RuntimeError(text)) == is_fault


def test_every_item_of_the_stages_exists() -> None:
    pytest.importorskip("triton")
    from tests.engine.worker.driver import MODELS
    from tests.gpu.environment import GPU
    from tests.gpu.items import ITEMS
    from tests.gpu.kernel_items import KINDS
    from tests.gpu.parity_items import CASES

    arguments = {"kernels": set(KINDS), "parity": set(MODELS), "serve": set(GPU.loads)}
    for name in (item for groups in STAGES.values() for group in groups for lane in group.lanes for item in lane):
        kind, _, argument = name.partition(": ")
        assert kind in ITEMS
        assert not argument or argument in arguments[kind]
    assert set(CASES) == {"chunked", "prefix hit", "preempted"}
