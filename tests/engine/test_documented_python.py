"""The Python blocks of the documents that start an engine do so and print texts."""

from pathlib import Path

import pytest

from tests.docs.blocks import BLOCKS, Block

# Pages may show the same program.
PROGRAMS = {one.text: one for one in BLOCKS if one.starts_engine and not (one.needs or one.tested_by)}


@pytest.mark.real
@pytest.mark.parametrize("block", PROGRAMS.values(), ids=lambda block: block.where)
def test_the_program_prints_texts(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, block.where, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()
