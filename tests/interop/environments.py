"""The interpreters of clients: each client has a virtual environment of its own, since their dependencies conflict."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.interop.clients import Client

ENVIRONMENTS = Path(".interop")
INSTALLED = "requirements.txt"  # in an environment: what has been installed
INSTALL_S = 1800.0


class MissingError(Exception):
    """A client is not here; the message says why."""


def interpreter_of(client: Client, environments: Path = ENVIRONMENTS) -> Path:
    """The interpreter that has a client; its environment is made first if it is missing or has other versions.

    Raises MissingError if the client is not named by its variable and can't be installed.
    """
    if client.variable and (named := os.environ.get(client.variable)):
        found = shutil.which(named)
        if found is None:
            raise MissingError(f"{client.variable}={named} is not an interpreter")
        return Path(found)
    if not client.requirements:
        raise MissingError(f"{client.variable} names no interpreter that has it")
    folder = environments / client.key
    python = folder / "bin" / "python"
    wanted = "".join(f"{one}\n" for one in client.requirements)
    marker = folder / INSTALLED
    if python.exists() and marker.exists() and marker.read_text() == wanted:
        return python.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *client.requirements])
    marker.write_text(wanted)
    return python.absolute()


def _run(command: list[str]) -> None:
    print(f"make interop: {' '.join(command[-4:])}", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_S)
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")]
        raise MissingError((errors or lines or ["no reason given"])[-1])
