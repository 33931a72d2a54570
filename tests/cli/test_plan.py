"""`redline plan`: the command of docs/simulation/plan.md, shorter; progress, and errors."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from bench.planning.options import PlanRequest
from bench.planning.rows import Row
from cli.main import main
from cli.plan_table import show_plan

LLAMA = "meta-llama/Meta-Llama-3.1-8B-Instruct"
LOAD = ["plan", "--model", LLAMA, "--input", "256", "--output", "16", "--rate", "300", "--precision", "20%"]


def test_the_table_names_the_cheapest_and_why_others_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan"
    flags = ["--hardware", "h100", "--tp", "1,64", "--slo", "ttft_p99=400ms", "--price", "h100=2.5", "--out", str(out)]
    assert main([*LOAD, *flags]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"NVIDIA H100 SXM 80 GB .* cheapest", shown)
    assert "256/16 at 300 req/s, TTFT P99 up to 400 ms; simulated" in shown
    assert "h100 TP64: not supported: --tp 64" in shown
    assert "limited by" in shown
    assert "Errors of simulated latencies on NVIDIA H100 SXM 80 GB" in shown
    assert (out / "plan.csv").read_text().splitlines()[1].startswith("h100,")
    first = (out / "plan.csv").read_bytes(), (out / "points.csv").read_bytes()
    assert main([*LOAD, *flags, "--jobs", "1"]) == 0  # from the folder
    assert ((out / "plan.csv").read_bytes(), (out / "points.csv").read_bytes()) == first


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--hardware", "h99"], "no such hardware"),
        (["--tp", "two"], "is not a list of numbers of GPUs"),
        (["--price", "h100"], "is not a price"),
        (["--price", "tpu=3"], "'tpu' is not among the hardware of this plan"),
        (["--slo", "ttft=3"], "is not a valid limit"),
        (["--", "--device", "cpu"], "use --hardware"),
        (["--", "--tp", "2"], "use --tp before --"),
        (["--", "--data-parallel-size", "2"], "what the plan finds"),
        (["--", "--no-such-flag"], "--no-such-flag"),
        (["--", "--max-num-seqs", "many"], "--max-num-seqs"),
        (["--", "--block-size", "17"], "--block-size must be a power of two"),
    ],
)
def test_bad_input_is_one_line(flags: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LOAD, *flags]) == 2
    complaint = capsys.readouterr().err
    assert error in complaint
    assert len(complaint.splitlines()) == 1


def test_the_rate_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", LLAMA]) == 2
    assert "--rate" in capsys.readouterr().err


def test_a_flag_that_only_some_candidates_have_ends_no_plan(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--hardware", "h100", "--tp", "1,64", "--jobs", "1", "--", "--ablate", "driver-broadcast"]
    assert main([*LOAD, *flags]) == 1
    shown = capsys.readouterr().out
    assert "h100 TP1: not supported: --ablate driver-broadcast needs --tp 2" in shown
    assert "h100 TP64: not supported: --tp 64" in shown


def test_ctrl_c_in_a_terminal_keeps_what_is_done(tmp_path: Path) -> None:
    """A terminal sends SIGINT to all processes of its foreground group, here in a session of its own."""
    flags = ["--hardware", "h100", "--tp", "64,1,2", "--jobs", "2", "--out", str(tmp_path)]
    load = ["plan", "--model", LLAMA, "--input", "500", "--output", "2000", "--rate", "40"]
    command = [sys.executable, "-u", "-m", "cli.main", *load, *flags]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, start_new_session=True, stdout=pipe, stderr=pipe, text=True)
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("h100 TP64: not supported")
            os.killpg(process.pid, signal.SIGINT)
            shown, errors = process.communicate(timeout=120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert errors.strip() == ""
    assert "interrupted: 1 of 3 are done; with --out, the same command continues" in shown
    assert f"results: {tmp_path}" in shown
    (row,) = json.loads((tmp_path / "plan.json").read_text())["rows"]
    assert row["tp"] == 64


def test_the_table_says_how_a_plan_ended(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row("h100", "NVIDIA H100", 1, "abc", "does not fit", note="weights need 141 GB")]
    show_plan(Console(), PlanRequest(LLAMA, {}, 4.0, {}), rows, 2, "ended by an error")
    assert "ended by an error: 1 of 2 are done" in capsys.readouterr().out
    show_plan(Console(), PlanRequest(LLAMA, {}, 4.0, {}), rows, 1, "")
    assert "are done" not in capsys.readouterr().out
