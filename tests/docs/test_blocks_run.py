"""The unmarked blocks of the documents run as printed; `tests/docs/blocks.py` describes the markers of the others.

Blocks run in the order of their page, against the server that the page starts before them. Pages that start a server by
the same command share it. `tests/engine/test_documented_python.py` runs the Python blocks that start an engine.
"""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from cli.main import main
from tests.docs.blocks import BLOCKS, ROOT, Block, is_serve
from tests.docs.runner import prepare_folder, run_command, serving
from tests.plots.made import DEMO, Server, write_run


@dataclass
class Session:
    """Blocks that run one after the other, with one server or none."""

    server: str | None = None  # the command that starts it
    starting: list[Block] = field(default_factory=list)  # blocks that start this server
    blocks: list[Block] = field(default_factory=list)


def sessions() -> dict[str, Session]:
    """All unmarked blocks, by the command of their server or else by their page."""
    found: dict[str, Session] = {}
    page = name = ""
    for block in BLOCKS:
        if not block.executable or block.needs or block.tested_by or block.starts_engine:
            continue
        if block.page != page:
            page = name = block.page
        commands = block.commands if block.kind == "bash" else []
        servers = [one for one in commands if is_serve(one)]
        assert not servers or servers == commands, f"{block.where}: a block that starts a server has nothing else"
        for command in servers:
            name = shlex.join(["redline", *shlex.split(command, comments=True)[1:]]).replace(" --port 8000", "")
            found.setdefault(name, Session(command)).starting.append(block)
        if not servers:
            found.setdefault(name, Session()).blocks.append(block)
    return found


SESSIONS = sessions()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the blocks run, with the results that the pages draw."""
    for name in ("a", "b"):
        write_run(tmp_path / "results" / name, {"redline": Server(4.4, 70)}, DEMO, requests=20)
    monkeypatch.chdir(prepare_folder(tmp_path))
    return tmp_path


def run(session: Session, folder: Path, port: int | None = None) -> None:
    """Run all blocks. Reports are drawn in this process, which may have imported what they need."""
    for block in session.blocks:
        for command in block.commands:
            words = shlex.split(command, comments=True) if block.kind == "bash" else []
            if words[:2] == ["redline", "report"]:
                assert main(words[1:]) == 0, f"{block.where}: {command}"
                continue
            done = run_command(command, block.kind, folder, port)
            assert done.succeeded, f"{block.where}: exit code {done.code}:\n{command}\n{done.output}"


@pytest.mark.real
@pytest.mark.parametrize("name", [name for name, one in SESSIONS.items() if one.server is not None])
def test_blocks_with_a_server(name: str, folder: Path) -> None:
    session = SESSIONS[name]
    assert session.server is not None
    with serving(session.server, folder) as served:
        run(session, folder, httpx.URL(served.url).port)


@pytest.mark.parametrize("name", [name for name, one in SESSIONS.items() if one.server is None])
def test_blocks_without_a_server(name: str, folder: Path) -> None:
    run(SESSIONS[name], folder)


def test_each_block_is_run_or_says_what_it_needs() -> None:
    here = {one for session in SESSIONS.values() for one in (*session.blocks, *session.starting)}
    elsewhere = {one for one in BLOCKS if one.needs or one.tested_by or one.starts_engine}
    assert not [one.where for one in BLOCKS if one.executable and one not in here | elsewhere]


def test_tests_that_blocks_name_run_these_pages() -> None:
    for block in BLOCKS:
        if block.tested_by:
            assert block.page in (ROOT / block.tested_by).read_text(), f"{block.where}: {block.tested_by}"


def test_blocks_are_of_a_kind_that_can_be_run() -> None:
    shown = {"", "text", "yaml", "json"}
    wrong = [f"{one.where}: {one.kind}" for one in BLOCKS if not one.executable and one.kind not in shown]
    assert not wrong, "commands are in blocks of bash or python"
