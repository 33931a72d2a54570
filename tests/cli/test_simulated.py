"""`redline bench --device sim:NAME` and sweeps so simulated: the commands of docs/simulation/index.md, shorter."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bench.results import RunFiles
from bench.sweeps.sweep import run_sweep
from bench.sweeps.sweepfile import presets, read_sweep
from cli import bench
from cli.main import main
from cli.serve import engine_config
from engine.simulation import simulate
from tests.bench.quiet_progress import QuietProgress

LLAMA_8B = "meta-llama/Meta-Llama-3.1-8B-Instruct"
LLAMA_70B = "meta-llama/Llama-3.3-70B-Instruct"
SHORT = ["--input", "100", "--output", "20", "--precision", "20%"]


def run(*arguments: str | Path, model: str = LLAMA_8B, device: str = "sim:h100") -> Result:
    given = ["--device", device, "--model", model, *SHORT, *map(str, arguments)]
    return CliRunner().invoke(bench.command, given)


def test_given_rates_end_with_an_answer_and_files_that_say_what_was_simulated(tmp_path: Path) -> None:
    done = run("--rates", "20,40", "--window", "3", "--out", tmp_path, "--", "--max-num-seqs", "64")
    assert done.exit_code == 0, done.output
    lines = done.output.strip().splitlines()
    assert lines[-1].startswith("sustains 40 req/s")
    assert any(line.startswith("simulated ") for line in lines)
    assert f"100/20 on {LLAMA_8B}, simulated NVIDIA H100" in " ".join(done.output.split())
    summary = json.loads((tmp_path / "summary.json").read_text())
    known = summary["configurations"]["bench"]
    assert summary["simulated"] is True
    assert known["simulated"]["hardware"] == "h100"
    assert known["simulated"]["title"].startswith("NVIDIA H100")
    assert len(known["simulated"]["description"]) == 12
    assert known["resolved"]["100/20"]["max_num_seqs"] == 64
    assert known["resolved"]["100/20"]["max_model_len"] == 132
    assert known["options"]["max_minutes"] == 1440
    points = RunFiles(tmp_path).read_points()
    assert [p.phase for p in points] == ["probe", "fixed", "fixed"]
    assert all(p.valid and p.running_max for p in points[1:])
    assert points[1].warmup_s == pytest.approx(3 * points[0].e2e_p50_ms / 1e3, rel=0.01)


def test_the_warmup_can_be_given(tmp_path: Path) -> None:
    assert run("--rate", "40", "--window", "3", "--warmup", "2", "--out", tmp_path).exit_code == 0
    assert [p.warmup_s for p in RunFiles(tmp_path).read_points() if p.phase == "fixed"] == [2.0]


def test_v0_says_that_its_costs_are_not_validated(tmp_path: Path) -> None:
    done = run("--rate", "40", "--window", "3", "--out", tmp_path, "--", "--engine", "v0")
    assert done.exit_code == 0, done.output
    mark = json.loads((tmp_path / "summary.json").read_text())["configurations"]["bench"]["simulated"]
    assert (mark["engine"], mark["errors"]) == ("v0", {})
    assert mark["note"].endswith("not validated")
    assert f"warning: --device sim:h100: {mark['note']}" in done.output


def test_the_same_command_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        assert run("--rate", "40", "--window", "3", "--out", tmp_path / name).exit_code == 0
    first, second = ((tmp_path / name / "points.csv").read_bytes() for name in ("first", "second"))
    assert first == second


def test_flags_of_the_engine_change_what_is_simulated(tmp_path: Path) -> None:
    latencies = []
    for name, flags in {"v1": [], "v0": ["--engine", "v0"], "tp": ["--tp", "4"]}.items():
        out = tmp_path / name
        assert run("--rate", "40", "--window", "3", "--out", out, "--", *flags).exit_code == 0
        latencies.append(RunFiles(out).read_points()[-1].itl_p50_ms)
    v1, v0, ranks = latencies
    assert ranks < v1 < v0


def test_a_closed_loop_and_replicas(tmp_path: Path) -> None:
    file = tmp_path / "vllm.json"
    rates = []
    for replicas in ("1", "2"):
        done = run(
            "--concurrency", "128", "--num-requests", "512", "--out", tmp_path / replicas, "--save-vllm-json", file,
            "--", "--dp", replicas, "--max-num-seqs", "16",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        assert "load generator" not in done.output
        rates.append(RunFiles(tmp_path / replicas).read_points()[-1].achieved_rate)
    assert rates[1] > 1.3 * rates[0]
    assert json.loads(file.read_text())["completed"] == 512


def test_limits_and_data_of_texts(tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text(json.dumps({"prompt": "What is a cache? " * 30, "output_tokens": 20}) + "\n")
    done = run_workload(data, "--rate", "5", "--window", "3", "--slo", "ttft_p99=1ms", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    (point,) = (p for p in RunFiles(tmp_path / "out").read_points() if p.phase == "fixed")
    assert point.binding == "latency limit"
    assert point.prefix_hit_rate is not None


def test_outputs_that_the_longest_length_cuts_are_told(tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text(json.dumps({"prompt": "What is a cache? " * 30, "output_tokens": 400}) + "\n")
    done = run_workload(data, "--rate", "5", "--window", "3", "--out", tmp_path / "out", "--", "--max-model-len", "300")
    assert "warning: the first request: the output was cut at --max-model-len 300" in done.output
    assert "outputs were cut at --max-model-len 300: raise it behind --" in done.output
    (point,) = (p for p in RunFiles(tmp_path / "out").read_points() if p.phase == "fixed")
    assert not point.valid
    assert "did not have the requested length" in point.reason


def run_workload(data: Path, *arguments: str | Path) -> Result:
    given = ["--device", "sim:h100", "--model", LLAMA_8B, "--workload", "jsonl", "--dataset", str(data)]
    return CliRunner().invoke(bench.command, [*given, *map(str, arguments)])


@pytest.mark.parametrize(
    "flags",
    [["--url", "http://h"], ["--api-key", "k"], ["--header", "a: b"], ["--insecure"], ["--extra-body", "{}"],
     ["--no-ignore-eos"], ["--energy-gpus", "all"], ["--offline", "m"]],
)  # fmt: skip
def test_flags_of_servers_are_refused_by_name(flags: list[str]) -> None:
    done = run(*flags)
    assert done.exit_code == 2
    assert f"{flags[0].replace('--no-', '--')} has no meaning with --device sim:h100" in done.output


def test_other_wrong_flags() -> None:
    runner = CliRunner()
    done = runner.invoke(bench.command, ["--device", "sim:h100"])
    assert "--device sim:h100 needs --model" in done.output
    done = runner.invoke(bench.command, ["--device", "cuda", "--model", "m"])
    assert "only simulated hardware" in done.output
    assert "give --device once" in run("--", "--device", "cpu").output


@pytest.mark.parametrize(
    ("model", "device", "flags", "words", "code"),
    [
        (LLAMA_8B, "sim:h99", [], "no such hardware; known are a100, b200, h100, h200", 2),
        (LLAMA_70B, "sim:h100", [], "--device sim:b200", 1),
        (LLAMA_8B, "sim:h100", ["--tp", "3"], "--tp 3", 2),
        (LLAMA_8B, "sim:h100", ["--speculative", "ngram"], "--speculative ngram does not work on sim:h100", 2),
        (LLAMA_8B, "sim:h100", ["--max-model-len", "50"], "exceed --max-model-len 50", 1),
        (LLAMA_8B, "sim:h100", ["--no-such-flag"], "--no-such-flag", 2),
    ],
)
def test_what_cannot_be_simulated_is_one_line(
    model: str, device: str, flags: list[str], words: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["bench", "--device", device, "--model", model, *SHORT, "--out", str(tmp_path), "--", *flags]
    assert main(given) == code
    complaint = capsys.readouterr().err
    assert words in complaint
    assert len(complaint.splitlines()) == 1


SWEEP = """
title: V1 and V0
model: {model}
configurations:
  v1: {{}}
  v0: {{serve: {{engine: v0}}}}
workloads:
  - {{kind: random, input: 100, output: 20}}
options: {{precision: 20%, rates: [20, 40], window: 3}}
"""


def test_a_sweep_on_simulated_hardware(tmp_path: Path) -> None:
    file = tmp_path / "pair.yaml"
    file.write_text(SWEEP.format(model=LLAMA_8B))
    plan, outputs = read_sweep(file, "sim:h100"), []
    for name in ("first", "second"):
        out = tmp_path / name
        summary = run_sweep(plan, out, QuietProgress(), lambda model, flags: simulate(engine_config(model, flags)))
        outputs.append((out / "points.csv").read_bytes())
    assert outputs[0] == outputs[1]
    assert [answer.rate for answer in summary.answers] == [40.0, 40.0]
    assert all(known["simulated"]["hardware"] == "h100" for known in summary.configurations.values())
    points = {(p.configuration, p.rate): p for p in RunFiles(out).read_points()}
    assert points["v1", 40.0].itl_p50_ms < points["v0", 40.0].itl_p50_ms


def test_an_engine_that_cannot_be_simulated_fails_alone(tmp_path: Path) -> None:
    file = tmp_path / "pair.yaml"
    file.write_text(SWEEP.format(model=LLAMA_8B).replace("engine: v0", "tp: 3"))
    assert main(["sweep", str(file), "--device", "sim:h100", "--out", str(tmp_path / "out")]) == 1
    summary = RunFiles(tmp_path / "out").read_summary()
    assert list(summary.failures) == ["v0 / 100/20"]
    assert "--tp 3" in summary.failures["v0 / 100/20"]
    assert len(summary.answers) == 1


def test_presets_run_on_simulated_hardware_without_a_change() -> None:
    for path in presets().values():
        plan = read_sweep(path, "sim:h100")
        assert plan.is_simulated
        assert plan.max_minutes() == 0


def test_flags_that_do_not_exist_fail_their_run_alone(tmp_path: Path) -> None:
    file = tmp_path / "pair.yaml"
    file.write_text(SWEEP.format(model=LLAMA_8B).replace("engine: v0", "no-such-flag: 3"))
    assert main(["sweep", str(file), "--device", "sim:h100", "--out", str(tmp_path / "out")]) == 1
    summary = RunFiles(tmp_path / "out").read_summary()
    assert list(summary.failures) == ["v0 / 100/20"]
    assert "--no-such-flag" in summary.failures["v0 / 100/20"]
