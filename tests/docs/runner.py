"""Runs commands of the documents as they are printed, in a folder, against a server on a free port instead of 8000."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cli.exit_codes import UNDECIDED
from tests.docs.blocks import ROOT, is_serve
from tests.serving import Served, serve

DEFAULT_PORT = re.compile(r"(?<=localhost:|127\.0\.0\.1:)8000\b")
IN_REPOSITORY = {"make", "pytest"}


@dataclass(frozen=True, slots=True)
class Done:
    command: str
    seconds: float
    code: int
    output: str  # stdout and stderr

    @property
    def succeeded(self) -> bool:
        """Whether it did what it is printed for.

        curl ends with 0 although the server refuses. A report ends with 1 if its condition holds, and a search with
        `UNDECIDED` if the machine is too busy to judge a rate.
        """
        if self.command.startswith("curl"):
            return self.code == 0 and '"error"' not in self.output
        expected = {0}
        if "redline report" in self.command and "--fail-if" in self.command:
            expected.add(1)
        if "redline bench" in self.command:
            expected.add(UNDECIDED)
        return self.code in expected


def prepare_folder(folder: Path) -> Path:
    """Make a folder that has `.venv` as a checkout has it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def run_command(command: str, kind: str, folder: Path, port: int | None = None, limit_s: float = 120.0) -> Done:
    """Run a command of a `bash` block, or a `python` block. After `limit_s` it is killed and has exit code 124."""
    text = command if port is None else with_port(command, port)
    argv = [sys.executable, "-c", text] if kind == "python" else ["bash", "-o", "pipefail", "-c", text]
    program = command.split(maxsplit=1)[0].rpartition("/")[2]
    begin = time.monotonic()
    process = subprocess.Popen(
        argv,
        cwd=ROOT if program in IN_REPOSITORY else folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        code = process.returncode
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        code = 124
    return Done(command, time.monotonic() - begin, code, output)


def with_port(command: str, port: int) -> str:
    """The command with `port` in place of the default one."""
    text = DEFAULT_PORT.sub(str(port), command)
    if re.match(r"\S*redline bench ", command) and not re.search(r"--(url|model) ", command):
        first, comment, rest = text.partition("  #")
        text = f"{first} --url http://127.0.0.1:{port}{comment}{rest}"
    return text


def environment() -> dict[str, str]:
    """That of a shell in which the virtual environment is active."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    search = f"{Path(sys.prefix) / 'bin'}{os.pathsep}{kept.get('PATH', os.defpath)}"
    return {**kept, "PATH": search, "PYTHONPATH": str(ROOT)}


@contextmanager
def serving(command: str, folder: Path, *more: str) -> Iterator[Served]:
    """The server of a `redline serve` command, with `more` flags; it is ended as by Ctrl-C."""
    assert is_serve(command), command
    words = shlex.split(command, comments=True)[2:]
    for at, word in enumerate(words):
        if word == "--port":
            del words[at : at + 2]
            break
    with serve(folder, *words, *more) as served:
        yield served
