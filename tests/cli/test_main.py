import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from cli import main as cli_main
from cli.main import COMMANDS, main
from cli.options import SIZE
from engine.errors import ConfigError, ModelError
from engine.signals import EndSignal


def run_raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli_main.redline, "main", fail)
    return main(["serve"])


@pytest.mark.parametrize(("error", "code"), [(ModelError("no such\n  model"), 1), (ConfigError("no such flag"), 2)])
def test_known_errors_are_one_line_and_an_exit_code(error, code, monkeypatch, capsys):
    assert run_raising(error, monkeypatch) == code
    shown = capsys.readouterr()
    assert shown.err == f"redline: error: {' '.join(str(error).split())}\n"
    assert shown.out == ""


def test_errors_of_the_bench_are_known_too(monkeypatch, capsys):
    from bench.errors import BenchError

    assert run_raising(BenchError("nobody answers at --url"), monkeypatch) == 1
    assert capsys.readouterr().err == "redline: error: nobody answers at --url\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_ctrl_c_is_130_without_a_word(error, monkeypatch, capsys):
    assert run_raising(error, monkeypatch) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_starting_is_its_exit_code(number, code, monkeypatch, capsys):
    before = signal.getsignal(number)
    try:
        assert run_raising(EndSignal(number), monkeypatch) == code
        assert signal.getsignal(number) == signal.SIG_IGN  # another one can't change the exit code
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().err == ""


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        run_raising(ZeroDivisionError(), monkeypatch)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "nothing"),
        (["serve", "model", "--no-such-flag"], "--no-such-flag"),
        (["serve", "model", "--port", "many"], "--port"),
        (["serve", "model", "--max_model_len", "long"], "--max-model-len"),
        (["serve"], "give one model"),
        (["serve", "a", "--model", "b"], "give one model"),
    ],
)
def test_wrong_usage_is_one_line_and_2(arguments: list[str], said: str, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert "--help" in shown
    assert shown.count("\n") == 1


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("redline ")


def test_the_help_of_serve_fits_a_screen_a_group(capsys):
    assert main(["serve", "--help"]) == 0
    groups = capsys.readouterr().out.split("\n\n")
    assert len(groups) >= 5
    assert max(group.count("\n") for group in groups) < 40


def test_help_is_quick_to_load():
    check = (
        "import sys; from cli.main import main; main(['serve', '--help'])\n"
        "sys.exit(', '.join(m for m in ('torch', 'pandas', 'fastapi', 'tokenizers') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_leaves_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", "--help"], check=False, stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8192", 8192),
        ("8k", 8000),
        ("8K", 8192),
        ("1.5k", 1500),
        ("2750.0", 2750),
        ("32,768", 32768),
        ("2GiB", 2 * 1024**3),
        ("2G", 2 * 1024**3),
        ("2GB", 2_000_000_000),
        ("1M", 1024**2),
    ],
)
def test_sizes(text: str, size: int):
    assert SIZE.convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "k", "-1", "1.5", "8x", "1e3"])
def test_what_is_no_size(text: str):
    with pytest.raises(click.BadParameter):
        SIZE.convert(text, None, None)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_cant_be_written_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", "sweep"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (
        1,
        "redline: error: the output can't be written: No space left on device\n",
    )
