"""Results of the GPU check: rows that a child process sends to its parent, and the files that the parent writes."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

MARK = "@@ "  # begins the lines of rows; whatever else a child prints is no row


class SkipError(Exception):
    """An item that can't run here; the message is the reason."""


# What torch and Triton say once the GPU's context is lost; running out of memory or of registers is not among it.
FAULTS = ("CUDA error", "Triton Error [CUDA]", "illegal memory access", "device-side assert")


def is_device_fault(error: BaseException) -> bool:
    """Whether nothing else can run in this process."""
    return any(words in str(error) for words in FAULTS)


@dataclass(frozen=True)
class Row:
    """One result. measured: a number or words; bar: what it must be, in words; passed: None without a bar."""

    item: str
    name: str
    measured: float | str | None
    unit: str = ""
    bar: str = ""
    passed: bool | None = None
    note: str = ""
    detail: Any = None  # in the JSON only


class Reporter:
    """Sends the rows of an item to the parent."""

    def __init__(self, item: str, out: TextIO = sys.stdout):
        self.item = item
        self._out = out

    def row(
        self,
        name: str,
        measured: float | str | None,
        unit: str = "",
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        passed: bool | None = None,
        note: str = "",
        detail: Any = None,
    ) -> None:
        """One row; with `at_most` or `at_least` a number must be within it."""
        limits = (("≤", at_most), ("≥", at_least))
        bar = " and ".join(f"{sign} {limit:g}" for sign, limit in limits if limit is not None)
        if bar:
            assert isinstance(measured, int | float)
            within = (at_most is None or measured <= at_most) and (at_least is None or measured >= at_least)
            passed = within if passed is None else within and passed
        self.send(Row(self.item, name, measured, unit, bar, passed, note, detail))

    def send(self, row: Row) -> None:
        self._out.write(f"{MARK}{json.dumps(asdict(row))}\n")
        self._out.flush()


def word(row: Row) -> str:
    return {True: "passed", False: "FAILED", None: "-"}[row.passed]


def line(row: Row) -> str:
    """A row in the terminal."""
    value = f"{row.measured:.4g}" if isinstance(row.measured, float) else str(row.measured)
    bar = f" ({row.bar})" if row.bar else ""
    note = f"  {row.note}" if row.note else ""
    return f"{word(row):7} {row.item}: {row.name}: {value} {row.unit}{bar}{note}"


def write_files(folder: Path, facts: dict[str, Any], rows: Sequence[Row]) -> None:
    """gpu-check.json and gpu-check.md, whole again after each row, so that a run that ends early keeps its results."""
    _replace(folder / "gpu-check.json", json.dumps(facts | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    lines = ["# GPU check", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += ["| item | what | measured | bar | result | note |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        value = f"{row.measured:.4g}" if isinstance(row.measured, float) else str(row.measured)
        cells = (row.item, row.name, f"{value} {row.unit}".strip(), row.bar, word(row), row.note)
        lines.append(f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in cells)} |")
    _replace(folder / "gpu-check.md", "\n".join(lines) + "\n")


def _replace(path: Path, text: str) -> None:
    new = path.with_suffix(path.suffix + ".new")
    new.write_text(text)
    new.replace(path)
