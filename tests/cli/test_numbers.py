"""Options that take numbers: what is not a finite number of a usable size is refused in one line, in every command."""

import importlib

import click
import pytest

from bench.errors import BenchError
from bench.sweeps.sweepfile import read_sweep
from bench.workloads import make_workload
from cli.main import COMMANDS, main

NUMBERS = ("nan", "inf", "-inf", "1e999", "Infinity", "9" * 400, "9" * 5000)


def options() -> list[tuple[str, click.Option]]:
    """(command, option) of all commands whose options are numbers, or are made of numbers."""
    found = []
    for name in COMMANDS:
        command = importlib.import_module(f"cli.{name}").command
        for option in command.params:
            textual = (click.Path, click.Choice, type(click.STRING), type(click.BOOL), click.types.UnprocessedParamType)
            if isinstance(option, click.Option) and not option.is_flag and not isinstance(option.type, textual):
                found.append((name, option))
    return found


def test_all_numbers_are_looked_at() -> None:
    names = {option.opts[0] for _, option in options()}
    assert {"--rate", "--rates", "--max-minutes", "--window", "--burstiness", "--precision", "--input"} <= names
    assert {"--step-timeout", "--gpu-memory-utilization", "--max-num-seqs", "--port"} <= names


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_that_are_none_are_refused(number: str) -> None:
    for command, option in options():
        whole = isinstance(option.type, type(click.INT) | click.IntRange)
        if whole and len(number) == 400 and (command == "serve" or option.opts[0] == "--seed"):
            continue  # the engine judges its own; any whole number is a seed
        try:
            taken = option.type.convert(number, option, None)
        except click.BadParameter:
            continue
        pytest.fail(f"redline {command} {option.opts[0]} {number[:20]} is taken as {str(taken)[:20]}")


@pytest.mark.parametrize("number", ["nan", "inf", "1e999"])
@pytest.mark.parametrize("flag", ["--rate", "--rates", "--max-minutes", "--window", "--burstiness", "--precision"])
def test_the_line_names_the_flag(flag: str, number: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", flag, number]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert flag in line


LIMIT = "limits: {ttft_p99_ms: %s}"


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf", "1.0e+400"])
@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("options.precision", "precision: %s"), ("options.max_minutes", "max_minutes: %s"),
        ("options.window", "window: %s"), ("options.rates", "rates: [1, %s]"), ("options.ladder", "ladder: [1, %s]"),
        ("options.rounds", "rounds: %s"), ("options.limits.ttft_p99_ms", LIMIT),
        ("options.burstiness", "{arrivals: gamma, burstiness: %s}"),
    ],
)  # fmt: skip
def test_a_sweep_names_the_field(where: str, line: str, number: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("sweep") / "s.yaml"
    fields = line % number if line.startswith("{") else "{" + line % number + "}"
    common = "configurations: {a: {command: 'x --port {port}'}}\nworkloads: [{kind: random, input: 5, output: 5}]\n"
    path.write_text(f"{common}options: {fields}\n")
    with pytest.raises(BenchError, match=where):
        read_sweep(path)
    path.write_text(common.replace("input: 5", f"input: {number}") + "seed: 1\n")
    with pytest.raises(BenchError, match=r"workloads\[0\].*input must be an integer"):
        read_sweep(path)
    path.write_text(common + f"seed: {number}\n")
    with pytest.raises(BenchError, match="seed must be an integer"):
        read_sweep(path)


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "random", "input": [1, None], "output": 5}, {"kind": "random", "input": 5, "output": None},
        {"kind": "shared-prefix", "prefix": None, "input": 5, "output": 5},
        {"kind": "shared-prefix", "prefix": 5, "input": 5, "output": 5, "prefixes": None},
        {"kind": "multi-turn", "input": 5, "output": 5, "turns": None},
        {"kind": "multi-turn", "input": 5, "output": 5, "conversations": None},
        {"kind": "sharegpt", "dataset": ".", "max_input": None}, {"kind": "sharegpt", "dataset": ".", "rows": None},
        {"kind": "visionarena", "dataset": ".", "output": None}, {"kind": "mmmu-pro", "dataset": ".", "repeat": None},
    ],
)  # fmt: skip
@pytest.mark.parametrize("number", [float("nan"), float("inf"), 10**12])
def test_a_workload_names_the_field(spec: dict, number: float) -> None:
    (field,) = (key for key, value in spec.items() if value is None or isinstance(value, list))
    filled = {key: number if value is None else value for key, value in spec.items()}
    filled |= {key: [1, number] for key, value in spec.items() if isinstance(value, list)}
    with pytest.raises(BenchError, match=f"{field} must be an integer from"):
        make_workload(filled, 1000)
