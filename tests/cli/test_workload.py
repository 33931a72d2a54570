"""Flags that say what is sent and when."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.results import RunFiles
from bench.target.server import ServerProcess
from bench.workloads import make_workload
from bench.workloads.presets import read_workload, workload_presets
from cli.main import main
from engine.data import datasets_folder

STUB = Path(__file__).parents[1] / "bench" / "workloads" / "caching_server.py"
QUICK = ["--window", "1", "--max-minutes", "1"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """URL of a server that doesn't tell its vocabulary, and the file of what it is sent."""
    folder = tmp_path_factory.mktemp("stub")
    record = folder / "record.jsonl"
    command = [sys.executable, str(STUB), "--port", "{port}", "--record", str(record), "--no-vocabulary"]
    with ServerProcess(command, folder / "server.log", start_limit_s=60) as process:
        yield process.base_url, record


def sent(record: Path) -> list[dict]:
    """What was sent, without the single tokens by which the end of a load point is awaited."""
    return [row for row in map(json.loads, record.read_text().splitlines()) if row["max_tokens"] > 1]


def test_every_shipped_workload_is_made_or_asks_for_its_data() -> None:
    assert set(workload_presets()) >= {
        "500-2000", "2048-128", "6000-4000", "shared-prefix", "multi-turn", "visionarena", "visionarena-sample",
        "sharegpt", "mmmu-pro",
    }  # fmt: skip
    for name in workload_presets():
        spec = read_workload(name)
        if spec["kind"] not in ("sharegpt", "jsonl"):
            assert make_workload(spec, 32_000).max_tokens > 0


def test_pictures_are_sent_without_a_vocabulary(server: tuple[str, Path], tmp_path: Path) -> None:
    url, record = server
    asked = ["bench", "--url", url, "--workload", "visionarena-sample", "--output", "2", "--rate", "10", *QUICK]
    assert main([*asked, "--arrivals", "gamma", "--burstiness", "0.5", "--out", str(tmp_path)]) == 0
    files = RunFiles(tmp_path)
    assert files.read_points()[-1].requests == 10
    summary = files.read_summary()
    (described,) = summary.workloads.values()
    assert described["kind"] == "visionarena"
    assert described["output"] == 2
    arrivals = summary.configurations["bench"]["options"]["arrivals"]
    assert (arrivals["kind"], arrivals["burstiness"]) == ("gamma", 0.5)
    rows = sent(record)
    assert all(row["max_tokens"] == 2 and len(row["pictures"]) == 1 for row in rows)


def test_a_trace_gives_times_lengths_and_rate(server: tuple[str, Path], tmp_path: Path) -> None:
    url, record = server
    trace = tmp_path / "trace.csv"
    trace.write_text("timestamp,input_tokens,output_tokens\n" + "".join(f"{5 + i / 8},{20 + i},3\n" for i in range(9)))
    asked = ["bench", "--url", url, "--trace", str(trace), "--vocab-size", "30000", *QUICK]
    assert main([*asked, "--out", str(tmp_path / "a")]) == 0
    point = RunFiles(tmp_path / "a").read_points()[-1]
    assert (point.rate, point.requests, point.workload) == (8.0, 8, "trace trace")
    requests = RunFiles(tmp_path / "a").read_requests(point.point_id)
    assert requests["input_tokens"].tolist()[:9] == [20 + i for i in range(len(requests))][:9]
    assert main([*asked, "--rate", "16", "--input", "30", "--output", "2", "--out", str(tmp_path / "b")]) == 0
    point = RunFiles(tmp_path / "b").read_points()[-1]
    assert (point.rate, point.requests, point.workload) == (16.0, 16, "30/2")
    assert sent(record)[-1]["max_tokens"] == 2


def test_a_mooncake_trace_is_replayed_in_milliseconds_with_its_prefixes(
    server: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, record = server
    rows = [
        {"timestamp": 1000 + 125 * i, "input_length": 600 + i, "output_length": 2 + i % 2, "hash_ids": [7, 8 + i % 2]}
        for i in range(9)
    ]
    trace = tmp_path / "mooncake.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"timestamp": 5}]))
    asked = ["bench", "--url", url, "--trace", str(trace), "--vocab-size", "30000", *QUICK]
    assert main([*asked, "--out", str(tmp_path / "a")]) == 1
    assert "row 10 needs an integer" in capsys.readouterr().err
    before = len(sent(record))
    assert main([*asked, "--skip-bad-rows", "--out", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert "trace mooncake (Mooncake): 9 requests over 1 s (8 req/s); times in ms; input and output lengths" in said
    assert "skipped 1 bad row: row 10" in said
    files = RunFiles(tmp_path / "a")
    point = files.read_points()[-1]
    assert (point.rate, point.requests) == (8.0, 8)
    requests = files.read_requests(point.point_id)
    inside = requests[requests["in_window"]]
    assert (inside["intended_s"].diff().dropna() - 0.125).abs().max() < 1e-6
    assert set(inside["asked_output_tokens"]) == {2, 3}
    assert len(sent(record)) > before


def test_flags_replace_a_part_of_a_trace(server: tuple[str, Path], tmp_path: Path) -> None:
    url, record = server
    trace = tmp_path / "t.csv"
    trace.write_text("timestamp,input_tokens,extra\n" + "".join(f"{i / 8},{20 + i},x\n" for i in range(9)))
    asked = ["bench", "--url", url, "--trace", str(trace), "--vocab-size", "30000", *QUICK]
    assert main([*asked, "--output", "3", "--out", str(tmp_path / "a")]) == 0
    point = RunFiles(tmp_path / "a").read_points()[-1]
    assert point.workload == "trace t output 3"
    assert RunFiles(tmp_path / "a").read_requests(point.point_id)["input_tokens"].tolist()[:3] == [20, 21, 22]
    assert {row["max_tokens"] for row in sent(record)[-8:]} == {3}


def test_sharegpt_is_tokenised_by_the_server(server: tuple[str, Path], tmp_path: Path) -> None:
    url, record = server
    rows = [
        {"conversations": [{"from": "human", "value": f"a b c d e f{i}"}, {"from": "gpt", "value": "a b c d"}]}
        for i in range(5)
    ]
    (tmp_path / "s.json").write_text(json.dumps(rows))
    asked = ["bench", "--url", url, "--workload", "sharegpt", "--dataset", str(tmp_path / "s.json"), "--rate", "16"]
    assert main([*asked, *QUICK, "--out", str(tmp_path / "o")]) == 0
    last = sent(record)[-1]
    assert (last["path"], last["tokens"], last["max_tokens"]) == ("/v1/completions", 6, 4)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--workload", "sharegpt"], 1, "pass --dataset"),
        (["--workload", "sharegpt", "--dataset", "none.json"], 1, "no file or folder none.json (--dataset)"),
        (["--workload", "no-such"], 1, "unknown workload 'no-such': use one of"),
        (["--workload", "500-2000", "--turns", "3"], 2, "--turns does not apply to a workload of kind random"),
        (["--workload", "mmmu-pro", "--repeat", "200"], 2, "--repeat"),
        (["--dataset", "x"], 2, "--dataset needs --workload"),
        (["--burstiness", "2"], 2, "--burstiness needs --arrivals gamma"),
        (["--trace", "none.csv"], 1, "none.csv cannot be read"),
        (["--trace", "x", "--arrivals", "constant"], 2, "use --arrivals or --trace"),
        (["--trace", "half.csv"], 1, "half.csv has no column output_tokens (unknown columns: note)"),
        (["--trace", "odd.csv"], 1, "no known column has token counts (columns: prompt_size): pass --input"),
        (["--trace", "slow.csv"], 1, "the unit of column timestamp is ambiguous"),
        (["--trace-unit", "ms"], 2, "--trace-unit needs --trace or --workload"),
        (["--skip-bad-rows"], 2, "--skip-bad-rows needs --trace or --workload"),
        (["--turns", "3", "--input", "100"], 1, "pass --vocab-size or --tokenizer"),
    ],
)
def test_bad_flags_are_one_clear_line(
    arguments: list[str],
    code: int,
    words: str,
    server: tuple[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half.csv").write_text("timestamp,input_tokens,note\n1,5,a\n2,5,b\n")
    (tmp_path / "odd.csv").write_text("timestamp,prompt_size\n1,5\n2,5\n")
    (tmp_path / "slow.csv").write_text("timestamp,input_tokens,output_tokens\n0,5,2\n60000,5,2\n")
    assert main(["bench", "--url", server[0], *arguments]) == code
    stderr = capsys.readouterr().err
    assert words in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert not (tmp_path / "results").exists()


def test_a_workload_file_names_its_data_beside_it(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "hello there"}\n')
    path = tmp_path / "mine.yaml"
    path.write_text("description: mine\nkind: jsonl\ndataset: p.jsonl\noutput: 4\n")
    spec = read_workload(str(path))
    assert spec == {"kind": "jsonl", "dataset": str(tmp_path / "p.jsonl"), "output": 4}
    assert (datasets_folder() / "workloads" / "multi-turn.yaml").is_file()
