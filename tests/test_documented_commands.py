"""The commands of README.md, its siblings and docs/ are right: flags parse, targets, presets and files exist.

Nothing is run here: a `redline` command is parsed by the command itself, a `make` command is looked up in the Makefile.
`tests/docs/test_blocks_run.py` runs the blocks.
"""

import contextlib
import importlib.util
import io
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import click
import pytest

from cli.main import redline
from tests.docs.blocks import BLOCKS, DOCUMENTS, FENCE, HEREDOC, MARKER, NEEDS, ROOT, ROOT_FILES, split_lines

SPAN = re.compile(r"(?<!`)`((?:redline|make|tool(?! call)|python -m) [^`]+)`")
MARKED_FENCE = re.compile(MARKER.pattern + r"\n *```(?:bash|python)")
REDIRECTION = re.compile(r"(?<=\s)\d?(?:>&\d|&?>>?\s*[^\s|&;]+|<\s*[^\s|&;]+)")
SEPARATORS = {"|", "||", "&", "&&", ";", "(", ")", "|&"}
WRAPPERS = {"nice", "time", "nohup", "exec", "env", "sudo"}
SHELLS = {"bash", "console", "sh", "shell"}


@dataclass(frozen=True, slots=True)
class Command:
    """One command of a document."""

    where: str  # document:line
    words: tuple[str, ...]  # the program first, without variables before it

    @property
    def program(self) -> str:
        return self.words[0].rpartition("/")[2]


def commands_of(text: str, name: str) -> list[Command]:
    """All commands in the shell blocks of a document, and those of ours within its sentences and tables."""
    parts = [(block.start(), block["text"], block["kind"]) for block in FENCE.finditer(text) if block["kind"] in SHELLS]
    prose = FENCE.sub(lambda block: " " * len(block[0]), text)
    parts += [(span.start(), span[1], "bash") for span in SPAN.finditer(prose)]
    found = []
    for start, commands, kind in sorted(parts):
        where = f"{name}:{text.count(chr(10), 0, start) + 1}"
        found += [Command(where, words) for words in split_commands(commands, kind)]
    return found


def split_commands(block: str, kind: str) -> Iterator[tuple[str, ...]]:
    """The commands of a shell block; in `console` blocks those after a prompt, the rest is output."""
    block = textwrap.dedent(block)
    if kind == "console":
        block = "\n".join(re.findall(r"^\$ ((?:[^\n]*\\\n)*[^\n]*)", block, re.MULTILINE))
    for printed in split_lines(block):
        line = HEREDOC.sub("", printed).replace("\\\n", " ")
        words: list[str] = []
        lexer = shlex.shlex(REDIRECTION.sub(" ", f" {line}"), posix=True, punctuation_chars=";&|()")
        lexer.whitespace_split = True
        for word in [*lexer, ";"]:
            if word not in SEPARATORS:
                words.append(word)
                continue
            while words and (re.fullmatch(r"[A-Za-z_]\w*=.*", words[0], re.DOTALL) or words[0] in WRAPPERS):
                words.pop(0)
            if words:
                yield tuple(words)
            words = []


def check(command: Command) -> None:
    """Raise AssertionError, naming the place, where a command of ours can't be right."""
    try:
        if command.program in ("redline", "tool"):
            check_redline(list(command.words[1:]))
        elif command.program == "make":
            check_make(list(command.words[1:]))
        elif command.program.startswith("python"):
            check_python(list(command.words[1:]))
        elif command.program == "pytest":
            check_pytest(list(command.words[1:]))
    except (click.ClickException, AssertionError) as error:
        reason = error.format_message() if isinstance(error, click.ClickException) else str(error)
        raise AssertionError(f"{command.where}: {shlex.join(command.words)}: {reason}") from None


def check_redline(arguments: list[str]) -> None:
    """Parse the arguments as the command does."""
    anything = mock.patch.object(click.Path, "convert", lambda _self, value, _parameter, _context: value)
    with anything, contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(click.exceptions.Exit):
        group = redline.make_context("redline", list(arguments))
        name, command, rest = redline.resolve_command(group, [*group._protected_args, *group.args])
        assert command is not None, f"no subcommand {name}"
        context = command.make_context(name, rest, parent=group)
        for parameter, folder in (("preset_name", "presets"), ("workload", "workloads")):
            value = context.params.get(parameter)
            if value is not None and not value.endswith((".yaml", ".yml")):
                known = sorted(path.stem for path in (ROOT / "datasets" / folder).glob("*.yaml"))
                assert value in known, f"{value!r} is none of the {folder} {', '.join(known)}"


def make_targets() -> set[str]:
    lines = (ROOT / "Makefile").read_text().splitlines()
    return {name for line in lines if (found := re.match(r"([a-z][a-z -]*):(?!=)", line)) for name in found[1].split()}


def check_make(arguments: list[str]) -> None:
    unknown = [one for one in arguments if not one.startswith("-") and "=" not in one and one not in make_targets()]
    assert not unknown, f"the Makefile has no target {', '.join(unknown)}"


def check_python(arguments: list[str]) -> None:
    if arguments[:1] == ["-m"] and arguments[1].partition(".")[0] in ("cli", "engine", "bench", "plots", "tests"):
        assert importlib.util.find_spec(arguments[1]) is not None, f"no module {arguments[1]}"


def check_pytest(arguments: list[str]) -> None:
    paths = [one.partition("::")[0] for one in arguments if one.startswith("tests/")]
    missing = [one for one in paths if not (ROOT / one).exists()]
    assert not missing, f"no {', '.join(missing)}"


COMMANDS = [one for path in DOCUMENTS for one in commands_of(path.read_text(), str(path.relative_to(ROOT)))]


def test_documented_commands_are_right() -> None:
    wrong = []
    for command in COMMANDS:
        try:
            check(command)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)


def test_the_api_reference_names_what_there_is() -> None:
    """`mkdocs build --strict` finds the same, but not as soon."""
    names = [name for path in DOCUMENTS for name in re.findall(r"^::: ([\w.]+)$", path.read_text(), re.MULTILINE)]
    assert names
    for name in names:
        module, _, last = name.rpartition(".")
        source = ROOT / f"{module.replace('.', '/')}.py"
        there = (ROOT / f"{name.replace('.', '/')}.py").exists() or f"class {last}" in source.read_text()
        assert there, f"there is no {name}"


@pytest.mark.parametrize("path", ROOT_FILES, ids=lambda path: path.name)
def test_links_in_the_repository_lead_somewhere(path: Path) -> None:
    """Those of docs/ are checked by `mkdocs build --strict`."""
    links = re.findall(r"\]\(([^():\s#]+)(?:#[^()\s]*)?\)", path.read_text())
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_commands_are_found() -> None:
    ours = {command.words[1] for command in COMMANDS if command.program == "redline" and len(command.words) > 1}
    assert ours >= {"serve", "bench", "sweep", "report"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_markers_stand_before_blocks(path: Path) -> None:
    text = FENCE.sub(lambda block: block[0].splitlines()[0], path.read_text())
    text = re.sub(r"(?<!`)`[^`\n]+`(?!`)", "", text)  # what is quoted is no marker
    assert len(MARKED_FENCE.findall(text)) == len(MARKER.findall(text)), "a marker stands on the line before its block"


def test_markers_name_what_a_block_needs() -> None:
    wrong = [f"{one.where}: {', '.join(sorted(one.needs - NEEDS))}" for one in BLOCKS if one.needs - NEEDS]
    assert not wrong, f"{wrong}: known are {sorted(NEEDS)}"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("redline serve smollm2-135m --max-model-length 4K", "No such option"),
        ("redline serve smollm2-135m --dtype float8", "'float8' is not one of"),
        ("redline serve smollm2-135m --trust-remote-code", "is not supported"),
        ("redline bench --rates 1,two", "not a list of rates"),
        ("redline bench --workload shared-prefixes", "is none of the workloads"),
        ("redline sweep --preset v0", "is none of the presets"),
        ("redline measure", "No such command"),
        ("VLLM_PYTHON=/opt/vllm/bin/python make bench-rate", "no target bench-rate"),
        (".venv/bin/python -m tests.perf.bench_rate", "no module"),
        (".venv/bin/pytest tests/engine/kernel -k amx", "no tests/engine/kernel"),
    ],
)
def test_a_wrong_command_is_found(line: str, reason: str) -> None:
    (command,) = commands_of(f"text\n\n```bash\n{line}  # comment\n```\n", "page.md")
    with pytest.raises(AssertionError, match=re.escape(reason)) as failure:
        check(command)
    assert str(failure.value).startswith("page.md:3: ")


def test_blocks_are_split_as_a_shell_does() -> None:
    text = textwrap.dedent("""
        ```console
        $ A=1 redline serve m --port 8000 > log 2>&1 &
        serving
        $ redline bench \\
            --rates 1,2 | tail -1 && redline report a b --fail-if 'itl_p99>+5%'
        ```
        ```bash
        cat > w.yaml <<'EOF'
        redline nonsense
        EOF
        curl localhost:8000/v1/completions -d '{
          "prompt": "a & b"
        }'
        ```
        ```python
        redline = 1
        ```
        Type `make lint` or `redline`, but not `--rates`.
    """)
    assert [one.words for one in commands_of(text, "page.md")] == [
        ("redline", "serve", "m", "--port", "8000"),
        ("redline", "bench", "--rates", "1,2"),
        ("tail", "-1"),
        ("redline", "report", "a", "b", "--fail-if", "itl_p99>+5%"),
        ("cat",),
        ("curl", "localhost:8000/v1/completions", "-d", '{\n  "prompt": "a & b"\n}'),
        ("make", "lint"),
    ]
