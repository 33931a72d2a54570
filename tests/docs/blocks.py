"""The fenced blocks of README.md, CONTRIBUTING.md, ARCHITECTURE.md and docs/, and the commands in them.

`test_blocks_run.py` executes blocks of `bash` and `python`, unless the line before a block is one of these:

    <!-- tested by: tests/cli/test_lora_served.py -->
    <!-- needs: minutes -->

`make docs-commands` executes the `minutes` blocks. Blocks that need anything else are not executed.
"""

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOT_FILES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md")]
DOCUMENTS = [*ROOT_FILES, *sorted((ROOT / "docs").rglob("*.md"))]
MINUTES = "minutes"  # more time than the suite has for it
NEEDS = {MINUTES, "network", "gpu", "hosts", "another server"}  # hosts: several of them

FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>```+)(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)(?P=fence) *$",
    re.DOTALL | re.MULTILINE,
)
MARKER = re.compile(r"<!-- (?:needs: (?P<needs>[^>]*?)|tested by: (?P<test>\S+)) -->")
HEREDOC = re.compile(r"<<-?\s*['\"]?(\w+)['\"]?[^\n]*\n.*?^\1$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    page: str  # path below the repository
    line: int
    kind: str
    text: str  # without indentation
    needs: frozenset[str]
    tested_by: str  # a file of tests; "": `test_blocks_run.py`, or none

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def executable(self) -> bool:
        return self.kind in ("bash", "python")

    @property
    def starts_engine(self) -> bool:
        """A Python program with an engine of its own."""
        return self.kind == "python" and "from redline import" in self.text

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block as printed; the program of a Python block."""
        return [self.text] if self.kind == "python" else split_lines(self.text)


def blocks_of(text: str, page: str) -> list[Block]:
    found = []
    for fence in FENCE.finditer(text):
        before = text[: fence.start()].removesuffix("\n").rpartition("\n")[2]
        marker = MARKER.fullmatch(before.strip())
        needs = {one.strip() for one in (marker["needs"] or "").split(",")} - {""} if marker else set[str]()
        tested_by = marker["test"] or "" if marker else ""
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(page, line, fence["kind"], textwrap.dedent(fence["text"]), frozenset(needs), tested_by))
    return found


def split_lines(block: str) -> list[str]:
    """Divide a shell block into commands; one goes on over `\\` at an end, an open quote or a here-document."""
    found: list[str] = []
    pending = ""
    for line in block.splitlines():
        pending += f"\n{line}" if pending else line
        rest = HEREDOC.sub("", pending)
        if rest.endswith("\\") or re.search(r"<<-?\s*['\"]?\w", rest):
            continue
        try:
            words = shlex.split(rest, comments=True)
        except ValueError:  # a quote is open
            continue
        if words:
            found.append(pending)
        pending = ""
    assert not pending, f"a command does not end: {pending!r}"
    return found


def is_serve(command: str) -> bool:
    words = shlex.split(command, comments=True)
    return words[0].rpartition("/")[2] == "redline" and words[1:2] == ["serve"]


BLOCKS = [one for path in DOCUMENTS for one in blocks_of(path.read_text(), str(path.relative_to(ROOT)))]
