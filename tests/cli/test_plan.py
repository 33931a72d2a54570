"""`redline plan`: the command of docs/simulation/plan.md, shorter; progress, and errors."""

import re
from pathlib import Path

import pytest

from cli.main import main

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
    assert "h100 TP64: does not fit" in shown
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
    ],
)
def test_bad_input_is_one_line(flags: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LOAD, *flags]) in (1, 2)
    complaint = capsys.readouterr().err
    assert error in complaint
    assert len(complaint.splitlines()) == 1


def test_the_rate_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", LLAMA]) == 2
    assert "--rate" in capsys.readouterr().err
