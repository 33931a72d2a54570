"""`redline bench --concurrency`, and the result file of `vllm bench serve`."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.results import RunFiles
from bench.target.server import ServerProcess
from cli.main import main

pytestmark = pytest.mark.usefixtures("patient_generator")

STUB = Path(__file__).parents[1] / "bench" / "queue_server.py"
SIZES = ["--input", "20", "--output", "5"]


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("stub")
    command = [sys.executable, str(STUB), "--port", "{port}", "--slots", "8", "--service", "0.1", "--no-vocabulary"]
    with ServerProcess(command, folder / "server.log", start_limit_s=60) as server:
        yield server


def test_closed_loop(stub: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The server doesn't tell its vocabulary, as foreign ones don't."""
    out, file = tmp_path / "out", tmp_path / "vllm.json"
    load = ["--concurrency", "4", "--num-requests", "12", "--out", str(out), "--save-vllm-json", str(file)]
    code = main(["bench", "--url", stub.base_url, *SIZES, *load])
    text = capsys.readouterr().out
    point = RunFiles(out).read_points()[-1]
    assert (point.phase, point.concurrency, point.completed) == ("closed", 4, 12)
    last = text.strip().splitlines()[-1]
    assert code == (0 if point.valid else 1)
    assert last.startswith("concurrency 4: " if point.valid else "INVALID: the load generator")
    result = json.loads(file.read_text())
    assert (result["completed"], result["max_concurrency"], result["request_rate"]) == (12, 4, "inf")
    assert result["total_output_tokens"] == 60
    assert result["p99_itl_ms"] == pytest.approx(point.itl_p99_ms, rel=1e-4)
    assert result["median_ttft_ms"] == pytest.approx(point.ttft_p50_ms, rel=1e-4)


def test_the_same_file_of_a_given_rate(stub: ServerProcess, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "vllm.json"
    load = ["--rate", "10", "--window", "1", "--vocab-size", "1000", "--out", str(out), "--save-vllm-json", str(file)]
    main(["bench", "--url", stub.base_url, *SIZES, *load])
    point = RunFiles(out).read_points()[-1]
    result = json.loads(file.read_text())
    assert (result["num_prompts"], result["request_rate"]) == (point.requests, 10.0)
    assert result["median_ttft_ms"] == pytest.approx(point.ttft_p50_ms, rel=1e-4)


def test_ctrl_c_keeps_what_was_answered(stub: ServerProcess, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "vllm.json"
    load = ["--concurrency", "4", "--num-requests", "4000", "--out", str(out), "--save-vllm-json", str(file)]
    command = [sys.executable, "-m", "cli.main", "bench", "--url", stub.base_url, *SIZES, *load]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not RunFiles(out).read_points() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (130, "")
    point = RunFiles(out).read_points()[-1]
    assert point.reason == f"the load point was interrupted after {point.completed} of 4000 requests were answered"
    assert stdout.strip().splitlines()[-1] == f"INVALID: {point.reason}"
    assert "max-minutes" not in stdout
    result = json.loads(file.read_text())
    assert result["completed"] == point.completed > 8
    assert RunFiles(out).read_summary().finished is not None


@pytest.mark.parametrize("load", [["--concurrency", "4"], ["--rate", "10", "--window", "1", "--vocab-size", "1000"]])
def test_figures_that_cant_be_written_are_shown_and_kept_for_the_other_file(
    load: list[str], stub: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "out", tmp_path / "vllm.json"
    out.mkdir()
    (out / "requests").write_text("a file where the folder should be")
    asked = ["bench", "--url", stub.base_url, *SIZES, *load, "--out", str(out), "--save-vllm-json", str(file)]
    code = main(asked)
    output = capsys.readouterr()
    (line,) = output.err.strip().splitlines()
    if "--rate" in load:  # which ends at the probe, of which nothing can be written either
        assert code == 1
    assert str(out) in line
    assert "cannot be written: " in line
    assert "(--out)" in line
    assert not list(tmp_path.glob("**/*.part"))
    if "--concurrency" in load:
        assert output.out.strip().splitlines()[-1].startswith(("concurrency 4: ", "INVALID: the load generator"))
        assert json.loads(file.read_text())["completed"] == 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "file/out"], "file/out cannot be written: Not a directory (--out)"),
        (["--out", "file"], "file cannot be written: File exists (--out)"),
        (
            ["--save-vllm-json", "file/x.json", "--concurrency", "2"],
            "cannot be written: File exists (--save-vllm-json)",
        ),
        (["--save-vllm-json", "file/a/x.json", "--rate", "2"], "cannot be written: Not a directory (--save-vllm-json)"),
    ],
)
def test_wrong_places_are_refused_before_anything_is_measured(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("here")
    assert main(["bench", "--url", "http://127.0.0.1:1", *arguments]) == 1  # where no server is
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--concurrency", "4", "--rate", "1"], "--concurrency cannot be combined"),
        (["--num-requests", "4"], "needs --concurrency"),
        (["--save-vllm-json", "x.json"], "needs --concurrency or --rate"),
    ],
)
def test_flags_that_contradict_each_other(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err
