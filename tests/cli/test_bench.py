import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from bench.results import RunFiles
from bench.target.server import ServerProcess
from cli.main import main
from cli.params import LENGTH, LIMIT, RATES, SHARE

pytestmark = pytest.mark.usefixtures("patient_generator")

STUB = Path(__file__).parents[1] / "bench" / "queue_server.py"
QUICK = ["--input", "20", "--output", "5", "--precision", "20%", "--max-minutes", "1"]


def redline(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cli.main", "bench", *arguments]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(redline(*arguments), capture_output=True, text=True, cwd=cwd, timeout=120)


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("stub")
    command = [sys.executable, str(STUB), "--port", "{port}", "--slots", "4", "--service", "0.1"]
    with ServerProcess(command, folder / "server.log", start_limit_s=60) as server:
        yield server


def test_given_rates_end_with_a_table_an_answer_and_files(stub: ServerProcess, tmp_path: Path) -> None:
    done = run("--url", stub.base_url, *QUICK, "--rates", "10,90", "--window", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert lines[-1].startswith("sustains 10 req/s")
    assert "one request alone" in done.stdout
    assert "20/5 on stub" in done.stdout
    (folder,) = (tmp_path / "results").iterdir()
    assert re.fullmatch(r"bench-\d{8}-\d{6}", folder.name)
    files = RunFiles(folder)
    assert [p.phase for p in files.read_points()] == ["probe", "fixed", "fixed"]
    summary = files.read_summary()
    assert summary.finished is not None
    assert summary.answers[0].line() == lines[-1]
    assert summary.workloads == {"20/5": {"kind": "random", "input": 20, "output": 5}}
    assert summary.configurations["bench"]["options"]["rates"] == [10.0, 90.0]
    assert (
        "measured" in summary.configurations["bench"]["energy"] or "NVML" in summary.configurations["bench"]["energy"]
    )


def test_energy_that_cannot_be_measured_is_an_error_only_if_it_was_wanted(
    stub: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    asked = ["bench", "--url", stub.base_url, *QUICK, "--rate", "10", "--window", "1", "--out", str(tmp_path / "o")]
    assert main([*asked, "--energy-gpus", "0"]) == 1
    line = "redline: error: energy cannot be measured: the package nvidia-ml-py is not installed"
    assert capsys.readouterr().err.startswith(line)
    assert main([*asked, "--energy-gpus", "0-3"]) == 2
    assert "'0-3' names no GPUs: use all, none, or numbers such as 0,1" in capsys.readouterr().err
    assert main(asked) == 0
    files = RunFiles(tmp_path / "o")
    assert files.read_points()[-1].mean_power_w is None
    assert files.read_summary().configurations["bench"]["energy"] == (
        "not measured: the package nvidia-ml-py is not installed (pip install nvidia-ml-py)"
    )


def test_a_folder_is_shown_as_it_is(stub: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name with brackets and colons would mean styles and pictures to rich."""
    out = tmp_path / "[" / "x] [red] :fire:"
    main(["bench", "--url", stub.base_url, *QUICK, "--rates", "10", "--window", "1", "--out", str(out)])
    said = capsys.readouterr().out
    assert f"results: {out}\n" in said
    assert "20/5 on stub" in said


def test_windows_too_short_to_decide_are_exit_code_4(stub: ServerProcess, tmp_path: Path) -> None:
    done = run("--url", stub.base_url, *QUICK, "--rates", "30", "--window", "0.3", cwd=tmp_path)
    assert done.returncode == 4, done.stderr + done.stdout
    last = done.stdout.strip().splitlines()[-1]
    assert "undecided" in last or "too short" in last, last
    (folder,) = (tmp_path / "results").iterdir()
    point = RunFiles(folder).read_points()[-1]
    assert (point.sustained, point.undecided) == (None, True)


def test_ctrl_c_reports_what_is_there_and_exits_130(stub: ServerProcess, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = redline("--url", stub.base_url, *QUICK, "--rates", "10,15,20", "--window", "4", "--out", str(out))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while len(RunFiles(out).read_points()) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stdout.strip().splitlines()[-1].startswith("sustains 10 req/s")
    assert "Traceback" not in stderr
    points = RunFiles(out).read_points()
    assert points[1].sustained is True
    assert points[-1].valid is False
    assert RunFiles(out).read_summary().finished is not None


def test_ctrl_c_in_the_first_load_point_says_nothing_about_its_rate(stub: ServerProcess, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = redline("--url", stub.base_url, *QUICK, "--rates", "10,15", "--window", "30", "--out", str(out))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not RunFiles(out).read_points() and time.monotonic() < deadline:  # the probe
            time.sleep(0.1)
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        stdout, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stdout.strip().splitlines()[-1] == "no load point produced a valid result"
    assert RunFiles(out).read_summary().answers == []


def test_failed_requests_are_told_by_kind_and_in_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, str(STUB), "--port", "{port}", "--faults", "6=500,7=malformed,8=500"]
    with ServerProcess(command, tmp_path / "server.log", start_limit_s=60) as server:
        asked = ["bench", "--url", server.base_url, *QUICK, "--rate", "20", "--window", "1", "--slo", "ttft_p99=2s"]
        assert main([*asked, "--out", str(tmp_path / "o")]) == 3
    said = capsys.readouterr().out
    assert "failed at 20 req/s: 2 × http 500, 1 × malformed stream" in said
    assert "goodput" in said
    assert RunFiles(tmp_path / "o").read_points()[-1].failures == "http 500:2;malformed stream:1"


def test_the_last_words_of_an_own_server_that_ends_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = f"{sys.executable} {STUB} --port {{port}} --exit-from 14"
    script = f"{stub}; sleep 1; echo memory ran out; exit 7"  # its sockets close a while before it ends

    def ours(_model: str, _flags: list[str], log: Path) -> ServerProcess:
        return ServerProcess(["sh", "-c", script], log, start_limit_s=60)

    monkeypatch.setattr("cli.bench.ServerProcess.redline", ours)
    out = tmp_path / "o"
    rates = ["--rates", "4,40", "--window", "1"]
    assert main(["bench", "--model", "m", *QUICK, *rates, "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("redline: error: the server exited: memory ran out (exit code 7)")
    assert "sustains 4 req/s" in captured.out
    assert "connection" in RunFiles(out).read_points()[-1].failures
    summary = RunFiles(out).read_summary()
    assert summary.answers[0].rate == 4.0
    assert "stopped answering at 40 req/s" in summary.failures["bench / 20/5"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--url", "http://127.0.0.1:9"], 1, "--url"),
        (["--rate", "1", "--rates", "1,2"], 2, "use --rate or --rates, not both"),
        (["--rates", "1,x"], 2, "list of rates"),
        (["--input", "0"], 2, "not a valid token count"),
        (["--prefixes", "4"], 2, "--prefixes needs --prefix"),
        (["--model", "m", "--url", "http://127.0.0.1:9", "--", "--x"], 2, "without --url"),
        (
            ["--model", "m", "--url", "http://127.0.0.1:9", "--served-model", "n"],
            2,
            "either --model or --served-model",
        ),
        (["--ca", "x", "--insecure"], 2, "use --ca or --insecure, not both"),
        (["--extra-body", "[1]"], 2, "not a JSON object"),
        (["--extra-body", "{x"], 2, "not valid JSON"),
        (["--extra-body", '{"stream": false}'], 1, "--extra-body"),
        (["--header", "no colon"], 2, "Name: value"),
        (["--header", "Content-Length: 3"], 1, "cannot be set: the load generator sets it (--header)"),
        (["--api-key", " "], 1, "the API key is empty (--api-key)"),
        (["--url", "https://127.0.0.1:9", "--ca", "missing.pem"], 1, "missing.pem cannot be read"),
        (["--", "--max-num-seqs", "4"], 2, "need --model"),
        (["--slo", "ttft=2s"], 2, "ttft_p99=2s"),
        (["--model", "no-such-model-anywhere/x"], 1, "did not start"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str],
    code: int,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == code
    stderr = capsys.readouterr().err
    assert words in stderr
    assert len(stderr.strip().splitlines()) == 1


def test_requests_that_can_not_fit_are_refused_before_load(
    stub: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--url", stub.base_url, "--input", "4000", "--output", "200"]) == 1
    assert "4200 tokens exceed the server's maximum of 4096" in capsys.readouterr().err


def test_a_vocabulary_the_server_does_not_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, str(STUB), "--port", "{port}", "--no-vocabulary"]
    with ServerProcess(command, tmp_path / "server.log", start_limit_s=60) as server:
        asked = [
            "bench",
            "--url",
            server.base_url,
            *QUICK,
            "--rate",
            "5",
            "--window",
            "1",
            "--out",
            str(tmp_path / "o"),
        ]
        assert main(asked) == 1
        assert "--vocab-size or --tokenizer" in capsys.readouterr().err
        tokenizer = tmp_path / "tokenizer.json"
        vocabulary = {f"t{i}": i for i in range(500)}
        model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}
        tokenizer.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
        assert main([*asked, "--tokenizer", str(tmp_path)]) == 0
        assert "sustains 5 req/s" in capsys.readouterr().out


def test_types_of_flags() -> None:
    assert LENGTH.convert("100", None, None) == 100
    assert LENGTH.convert("100:200", None, None) == [100, 200]
    assert RATES.convert("1, 2.5,3", None, None) == [1.0, 2.5, 3.0]
    assert SHARE.convert("5%", None, None) == pytest.approx(0.05)
    assert SHARE.convert("0.05", None, None) == pytest.approx(0.05)
    assert LIMIT.convert("ttft_p99=2s", None, None) == ("ttft_p99_ms", 2000.0)
    assert LIMIT.convert("itl_p50=50ms", None, None) == ("itl_p50_ms", 50.0)
    bad = [(LENGTH, "9:3"), (LENGTH, "x"), (RATES, "0"), (RATES, ""), (SHARE, "200%"), (SHARE, "x"), (LIMIT, "x=1s")]
    for kind, text in bad:
        with pytest.raises(click.BadParameter):
            kind.convert(text, None, None)
