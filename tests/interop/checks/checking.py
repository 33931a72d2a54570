"""What the files of checks share. Each of them is a program that the interpreter of its client runs:

    python check_openai.py SETTING ROWS

SETTING is a JSON file with the servers and their models. To the file ROWS go, as lines of JSON, the version of the
client with the names of all checks, and then the result of each check.
"""

import asyncio
import importlib.metadata
import inspect
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 24},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
QUESTION = "What is the weather in Rome?"
WEATHER_ASKED = [{"role": "user", "content": QUESTION}]
FORCED: dict[str, Any] = {  # the arguments of a chat that must call it
    "messages": WEATHER_ASKED,
    "tools": [WEATHER],
    "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
    "temperature": 0,
}
PROMPT = "Name three colors of the rainbow."
KEY = "none"  # the servers ask for no key, but clients do


@dataclass(frozen=True, slots=True)
class Picture:
    """One shape: base64 of a PNG, and its color."""

    data: str
    color: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question with several continuations, and their log-likelihoods as transformers computes them."""

    context: str
    choices: list[str]
    likelihoods: list[float]


@dataclass(frozen=True, slots=True)
class Target:
    """A server.

    Attributes:
        url: without /v1.
        folder: of the model's files, where its tokenizer is.
        pictures: for a model that takes them.
        questions: for a model that generates.
    """

    url: str
    model: str
    folder: str
    pictures: list[Picture]
    questions: list[Question]

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"


@dataclass(frozen=True, slots=True)
class Check:
    """One feature of a client.

    Attributes:
        server: the kind of server that it uses: chat, embedding or vision.
        run: raises an exception if the feature does not work; may return a note for the table.
    """

    feature: str
    server: str
    run: Callable[[Target], Any]


CHECKS: list[Check] = []
Error = TypeVar("Error", bound=Exception)
Run = Callable[[Target], Any]


def check(feature: str, server: str = "chat") -> Callable[[Run], Run]:
    """Register a function, which may be a coroutine function, as the check of a feature."""

    def register(run: Run) -> Run:
        CHECKS.append(Check(feature, server, run))
        return run

    return register


def check_weather(arguments: str | dict[str, Any]) -> dict[str, Any]:
    """Assert that these are valid arguments of `WEATHER`, and return them."""
    values: dict[str, Any] = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert set(values) == {"city", "unit"}, values
    assert isinstance(values["city"], str), values
    assert 0 < len(values["city"]) <= 24, values
    assert values["unit"] in ("celsius", "fahrenheit"), values
    return values


def raised(kind: type[Error], call: Callable[[], Any]) -> Error:
    """Assert that a call raises an exception of this kind, and return it."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def run_check(one: Check, target: Target, loop: asyncio.Runner) -> dict[str, Any]:
    """Run a check, and return its row. Coroutines share a loop, since clients keep connections."""
    begin = time.monotonic()
    try:
        found = one.run(target)
        note = loop.run(found) if inspect.iscoroutine(found) else found
        passed = True
    except Exception as error:  # whatever a client raises is the result
        traceback.print_exc()
        first = str(error).strip().partition("\n")[0]
        passed, note = False, f"{type(error).__name__}: {first}"
    return {"feature": one.feature, "passed": passed, "seconds": time.monotonic() - begin, "note": note or ""}


def run_tool(command: Sequence[str | Path], folder: Path, without: Collection[str] = ()) -> None:
    """Run the command of a client in a folder, without these variables; what it prints goes to the log."""
    print("$", *command, file=sys.stderr, flush=True)
    environment = {name: value for name, value in os.environ.items() if name not in without}
    done = subprocess.run([*command], cwd=folder, env=environment, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}"


def version_of(*packages: str) -> str:
    """The version of the first of these packages that is installed."""
    found = {one.metadata["Name"].lower(): one.version for one in importlib.metadata.distributions()}
    return next(found[name] for name in packages if name in found)


def main(*packages: str) -> None:
    """Run all checks that the program has registered.

    Args:
        packages: names of the client, whose version is reported.
    """
    setting, rows = Path(sys.argv[1]), Path(sys.argv[2])
    targets = {}
    for kind, given in json.loads(setting.read_text()).items():
        pictures = [Picture(**one) for one in given.pop("pictures")]
        questions = [Question(**one) for one in given.pop("questions")]
        targets[kind] = Target(**given, pictures=pictures, questions=questions)
    with rows.open("w") as sink, asyncio.Runner() as loop:
        sink.write(json.dumps({"version": version_of(*packages), "features": [one.feature for one in CHECKS]}) + "\n")
        for one in CHECKS:
            sink.flush()
            print(f"--- {one.feature}", file=sys.stderr, flush=True)
            sink.write(json.dumps(run_check(one, targets[one.server], loop)) + "\n")
