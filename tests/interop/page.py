"""The stored table of `make interop`, and the page of the documentation that shows it."""

from collections.abc import Sequence
from pathlib import Path

from tests.interop.clients import CLIENTS
from tests.interop.rows import Row, markdown_table, read_rows, write_rows

TABLE = Path(__file__).with_name("table.json")
PAGE = Path(__file__).parents[2] / "docs" / "serving" / "clients.md"
BEGIN, END = "<!-- table: STORE=1 make interop -->\n", "<!-- /table -->"


def with_table(text: str, rows: Sequence[Row]) -> str:
    """The text of the page with the table of these rows."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{markdown_table(rows)}\n{END}{after}"


def store(rows: Sequence[Row], table: Path = TABLE, page: Path = PAGE) -> None:
    """Write the rows into the stored table, in place of those of the same clients, and the table into the page.

    Raises SystemExit if a row did not pass.
    """
    if wrong := [f"{row.client}, {row.feature}" for row in rows if row.passed is not True]:
        raise SystemExit(f"STORE=1: not stored, since not passed: {'; '.join(wrong)}")
    stored = read_rows(table) if table.exists() else []
    now = {row.client for row in rows}
    known = [*(row for row in stored if row.client not in now), *rows]
    merged = [row for client in CLIENTS for row in known if row.client == client.name]
    write_rows(table, merged)
    page.write_text(with_table(page.read_text(), merged))
