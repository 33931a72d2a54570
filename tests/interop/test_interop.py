"""The table of clients, their selection, and what becomes of their programs. The clients themselves: `make interop`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interop.__main__ import CHECKS
from tests.interop.clients import CLIENTS, SERVERS, Client, selected
from tests.interop.environments import INSTALLED, MissingError, interpreter_of
from tests.interop.page import BEGIN, END, PAGE, TABLE, store, with_table
from tests.interop.rows import Row, markdown_table, read_rows, rows_of_output

PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
from checking import check, main, raised

@check("works")
def works(target):
    raised(ZeroDivisionError, lambda: 1 / 0)
    return f"at {{target.base_url}}"

@check("fails")
async def fails(target):
    assert target.model == "another", "it is\\nnot"

@check("takes too long")
def ends(target):
    sys.exit(3)

main("no-such-package", "pytest")
"""
SETTING = '{"chat": {"url": "http://x", "model": "m", "folder": "f", "pictures": [], "questions": []}}'


def features(script: str) -> list[tuple[str, str]]:
    """The features and kinds of servers that a program of checks registers."""
    found = []
    for node in ast.parse((CHECKS / script).read_text()).body:
        for call in getattr(node, "decorator_list", []):
            if isinstance(call, ast.Call):  # of `check`; clients have decorators too
                values = [ast.literal_eval(one) for one in call.args]
                found.append((values[0], values[1] if len(values) > 1 else "chat"))
    return found


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.key)
def test_every_client_has_checks_and_their_servers(client: Client) -> None:
    found = [one for script in client.scripts for one in features(script)]
    assert len({feature for feature, _ in found}) == len(found) > 0
    assert {kind for _, kind in found} == set(client.servers) <= set(SERVERS)
    assert client.requirements or client.variable
    assert all("==" in one for one in client.requirements)


def test_every_program_of_checks_belongs_to_a_client() -> None:
    named = [script for client in CLIENTS for script in client.scripts]
    assert sorted(named) == sorted(path.name for path in CHECKS.glob("check_*.py"))


def test_the_stored_table_is_complete_and_shown() -> None:
    rows = read_rows(TABLE)
    expected = [(client.name, name) for client in CLIENTS for script in client.scripts for name, _ in features(script)]
    assert [(row.client, row.feature) for row in rows] == expected
    assert all(row.passed for row in rows)
    pinned = {client.name: client.requirements[0].partition("==")[2] for client in CLIENTS if client.requirements}
    assert {row.client: row.version for row in rows if row.client in pinned} == pinned
    assert all(row.version for row in rows)
    assert with_table(PAGE.read_text(), rows) == PAGE.read_text()


def test_only_a_table_without_failures_is_stored() -> None:
    with pytest.raises(SystemExit, match="x, y"):
        store([Row("x", "1", "z", True), Row("x", "1", "y", None)])


def test_rows_of_other_clients_stay_in_the_table(tmp_path: Path) -> None:
    table, page = tmp_path / "table.json", tmp_path / "page.md"
    page.write_text(f"Before.\n\n{BEGIN}{END}\n")
    first = [Row("litellm", "1", "a", True), Row("litellm", "1", "b", True), Row("openai", "1", "a", True)]
    store(first, table, page)
    newer = Row("litellm", "2", "a", True)
    store([newer], table, page)
    assert read_rows(table) == [first[2], newer], "in the order of CLIENTS"
    assert page.read_text() == f"Before.\n\n{BEGIN}\n{markdown_table([first[2], newer])}\n{END}\n"


def test_clients_are_selected_by_name() -> None:
    assert selected("") == CLIENTS
    assert [client.name for client in selected("litellm, vllm-bench-serve")] == ["litellm", "vllm bench serve"]
    with pytest.raises(ValueError, match="there is no curl; the clients are openai, anthropic"):
        selected("openai,curl")


def test_a_program_writes_its_rows(tmp_path: Path) -> None:
    program, setting, rows = (tmp_path / name for name in ("program.py", "setting.json", "rows.jsonl"))
    program.write_text(PROGRAM.format(folder=str(CHECKS)))
    setting.write_text(SETTING)
    assert subprocess.run([sys.executable, program, setting, rows], capture_output=True, check=False).returncode == 3
    works, fails, ended = rows_of_output("x", rows.read_text().splitlines(), "it ended")
    assert (works.version, works.feature, works.passed, works.note) == (
        pytest.__version__,
        "works",
        True,
        "at http://x/v1",
    )
    assert (fails.feature, fails.passed, fails.note) == ("fails", False, "AssertionError: it is")
    assert (ended.feature, ended.passed, ended.note) == ("takes too long", False, "it ended")


def test_a_program_that_does_not_start_is_a_failure() -> None:
    (row,) = rows_of_output("x", [], "see the log")
    assert (row.client, row.passed, row.note) == ("x", False, "see the log")


def test_the_table_names_a_client_once() -> None:
    rows = [Row("x", "1", "a", True), Row("x", "1", "b", False), Row("y", "", "all", None)]
    assert markdown_table(rows).splitlines()[2:] == ["| `x` | 1 | a | ✓ |", "|  |  | b | ✗ |", "| `y` |  | all | – |"]


def test_a_client_that_is_not_installed_needs_its_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = Client("x", (), (), variable="X_PYTHON")
    monkeypatch.delenv("X_PYTHON", raising=False)
    with pytest.raises(MissingError, match="X_PYTHON names no interpreter"):
        interpreter_of(given, tmp_path)
    monkeypatch.setenv("X_PYTHON", str(tmp_path / "python"))
    with pytest.raises(MissingError, match="is not an interpreter"):
        interpreter_of(given, tmp_path)
    monkeypatch.setenv("X_PYTHON", sys.executable)
    assert interpreter_of(given, tmp_path) == Path(sys.executable)


def test_an_environment_is_made_again_for_other_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / INSTALLED).write_text("no-such-package==1.0\n")
    assert interpreter_of(Client("X", ("no-such-package==1.0",), ()), tmp_path) == folder / "bin" / "python"
    for name, value in {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null", "PIP_FIND_LINKS": ""}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MissingError, match=r"no-such-package==1\.1"):
        interpreter_of(Client("X", ("no-such-package==1.1",), ()), tmp_path)
    assert not (folder / INSTALLED).exists(), "it is tried again"
