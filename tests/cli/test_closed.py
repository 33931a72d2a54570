"""`redline bench --concurrency`, and the result file of `vllm bench serve`."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.results import RunFiles
from bench.server import ServerProcess
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
    assert last.startswith("4 at a time: " if point.valid else "INVALID: the load generator")
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--concurrency", "4", "--rate", "1"], "either --concurrency or arrivals"),
        (["--num-requests", "4"], "needs --concurrency"),
        (["--save-vllm-json", "x.json"], "needs --concurrency or --rate"),
    ],
)
def test_flags_that_contradict_each_other(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err
