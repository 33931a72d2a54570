import sys
from pathlib import Path

import pytest
import yaml

from bench.measurement import machine
from bench.measurement.progress import duration
from cli.main import main

pytestmark = pytest.mark.usefixtures("patient_generator")

QUEUE = Path(__file__).parents[1] / "bench" / "queue_server.py"


def sweep_file(folder: Path, *flags: str) -> Path:
    command = " ".join([sys.executable, str(QUEUE), "--port", "{port}", "--service", "0.03", *flags])
    path = folder / "stubs.yaml"
    data = {
        "configurations": {"stub": {"command": command}},
        "workloads": [{"kind": "random", "input": 8, "output": 4, "rates": [20, 30, 40]}],
        "options": {"window": 0.4, "max_minutes": 0.5},
    }
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_without_a_file_the_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep"]) == 0
    said = capsys.readouterr().out
    for words in ("demo", "articles", "min", "Prefix caching on and off"):
        assert words in said
    assert not Path("results").exists()


def test_a_dry_run_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--preset", "demo", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "redline serve smollm2-135m --no-enable-prefix-caching --max-model-len 546" in said
    assert "2 runs, at most 8 min" in said
    assert not Path("results").exists()


def test_a_dry_run_says_what_a_short_ladder_is_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--preset", "ablation", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.count("search with 25% precision on the first configuration, then 0.5, 2.5 × ") == 27
    assert "--ablate no-run-ahead" in said


def test_an_answer_found_beside_others_says_so_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "DISTURBED_SHARE", -1.0)  # every point counts as disturbed
    path = sweep_file(tmp_path)
    path.write_text(path.read_text().replace("- 30\n", "").replace("- 40\n", ""))
    assert main(["sweep", str(path)]) == 0
    said = capsys.readouterr().out
    last = said.rstrip().splitlines()[-1]
    assert last.startswith("provisional: stub / 8/4: other processes used ")
    assert f"provisional: {last.partition('8/4: ')[2]}" in said
    assert "; disturbed: other processes used" in said


def test_a_sweep_ends_with_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(sweep_file(tmp_path))]) == 0
    said = capsys.readouterr().out
    assert said.rstrip().splitlines()[-1] == "report: results/stubs/report.html"
    folder = tmp_path / "results" / "stubs"
    assert {"points.csv", "report.html", "latency-8-4.png", "throughput.png"} <= {p.name for p in folder.iterdir()}
    header = (folder / "points.csv").read_text().splitlines()[0].split(",")
    wanted = "configuration workload rate sustained preemptions ttft_p50_ms ttft_p99_ms itl_p50_ms itl_p99_ms "
    assert set((wanted + "tpot_p50_ms output_tok_s").split()) <= set(header)


def test_requests_that_fail_make_the_exit_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(sweep_file(tmp_path, "--faults", "6=500,8=malformed"))]) == 3
    captured = capsys.readouterr()
    assert captured.err == "2 requests failed; see column `failures` of points.csv\n"
    assert "sustains" in captured.out


def test_failures_make_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(sweep_file(tmp_path, "--refuse", "no-memory"))]) == 1
    captured = capsys.readouterr()
    assert "no load point was measured (stub / 8/4: the server did not start: stub: error: no-memory" in captured.err
    assert "Traceback" not in captured.err + captured.out


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (["--preset", "nothing"], "'nothing' is not one of", 2),
        (["none.yaml"], "does not exist", 2),
        (["stubs.yaml", "--preset", "demo"], "use FILE or --preset", 2),
        (["empty.yaml"], "empty.yaml: a sweep must have the fields", 1),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str, code: int
) -> None:
    sweep_file(tmp_path)
    (tmp_path / "empty.yaml").touch()
    assert main(["sweep", *arguments]) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_minutes_in_words() -> None:
    assert [duration(60 * m) for m in (0.75, 7.2, 200)] == ["45 s", "7 min", "3 h 20 min"]
