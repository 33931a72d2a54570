"""The rows of `make interop`, and the table that they make."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

MARKS = {True: "✓", False: "✗", None: "–"}


@dataclass(frozen=True, slots=True)
class Row:
    """One feature of a client.

    Attributes:
        version: of the client; "" if it is not here.
        passed: None if it was skipped.
        note: why it failed or was skipped, or what was seen.
    """

    client: str
    version: str
    feature: str
    passed: bool | None
    seconds: float = 0.0
    note: str = ""


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file."""
    return [Row(**one) for one in json.loads(path.read_text())]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a results file, with a line for each row."""
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"[\n{lines}\n]\n")


def rows_of_output(client: str, lines: Sequence[str], reason: str) -> list[Row]:
    """The rows of a program of checks.

    Args:
        lines: of its file of rows; the first one has the version and all features.
        reason: why features without a line were not checked.
    """
    if not lines:
        return [Row(client, "", "start", False, note=reason)]
    head, *rest = (json.loads(line) for line in lines)
    done = {one["feature"]: one for one in rest}
    absent = {"passed": False, "note": reason}
    return [Row(client, head["version"], **{"feature": name, **done.get(name, absent)}) for name in head["features"]]


def terminal_table(rows: Iterable[Row]) -> Table:
    """The table of the terminal."""
    table = Table("client", "version", "feature", "passed", "s", "note", title="Clients, unchanged, against the server")
    for row in rows:
        style = {True: None, False: "red", None: "dim"}[row.passed]
        cells = (row.client, row.version, row.feature, MARKS[row.passed], f"{row.seconds:.1f}", row.note[:100])
        table.add_row(*map(escape, cells), style=style)
    return table


def markdown_table(rows: Iterable[Row]) -> str:
    """The table of the documentation: a line for each feature, the client and its version in its first one."""
    lines = ["| client | version | feature | passed |", "|---|---|---|---|"]
    previous = None
    for row in rows:
        first = row.client != previous
        previous = row.client
        client, version = (f"`{row.client}`", row.version) if first else ("", "")
        lines.append(f"| {client} | {version} | {row.feature} | {MARKS[row.passed]} |")
    return "\n".join(lines) + "\n"
