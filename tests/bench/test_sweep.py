import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import BenchError
from bench.progress import QuietProgress
from bench.results import RunFiles, Summary
from bench.run import measure_ladder
from bench.sweep import STATE_FILE, common_ladder, run_sweep
from bench.sweepfile import Configuration, model_len, presets, read_sweep

pytestmark = pytest.mark.usefixtures("patient_generator")

QUEUE = Path(__file__).with_name("queue_server.py")
SHORT = {"kind": "random", "input": 8, "output": 4, "name": "short"}
OPTIONS = {"rates": [30], "window": 0.4, "max_minutes": 0.5, "precision": "20%"}


def stub(*flags: str) -> dict[str, str]:
    return {"command": " ".join([sys.executable, str(QUEUE), "--port", "{port}", "--service", "0.03", *flags])}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a sweep of stub servers; keywords replace its fields."""

    def put(**changed: Any) -> Path:
        data = {
            "title": "Stubs",
            "seed": 3,
            "configurations": {"four": stub("--slots", "4"), "two": stub("--slots", "2")},
            "workloads": [SHORT],
            "options": OPTIONS,
        }
        path = tmp_path / "stubs.yaml"
        path.write_text(yaml.safe_dump(data | changed, sort_keys=False))
        return path

    return put


def sweep(path: Path, **kw: Any) -> Summary:
    return run_sweep(read_sweep(path), path.parent / "out", QuietProgress(), **kw)


def measured(folder: Path) -> set[tuple[str, str, float]]:
    """The set of points; a probe is one request, whose rate is what came out."""
    points = RunFiles(folder).read_points()
    return {(p.configuration, p.phase, 0.0 if p.phase == "probe" else p.rate) for p in points}


def test_given_rates_are_measured_on_every_configuration(write: Callable[..., Path], tmp_path: Path) -> None:
    summary = sweep(write(options=OPTIONS | {"rates": [20, 40]}))
    points = [p for p in RunFiles(tmp_path / "out").read_points() if p.phase == "fixed"]
    assert {(p.configuration, p.rate) for p in points} == {(c, r) for c in ("four", "two") for r in (20.0, 40.0)}
    by_rate = {rate: {p.seed for p in points if p.rate == rate} for rate in (20.0, 40.0)}
    assert all(len(seeds) == 1 for seeds in by_rate.values()), "configurations must see the same requests"
    assert by_rate[20.0] != by_rate[40.0]
    assert {(a.configuration, a.workload) for a in summary.answers} == {("four", "short"), ("two", "short")}
    assert not summary.failures
    assert summary.finished is not None
    assert summary.workloads["short"]["max_model_len"] == 14
    assert summary.configurations["two"]["model"] == "stub"
    assert RunFiles(tmp_path / "out").read_summary() == summary


def test_what_is_finished_is_not_measured_again(write: Callable[..., Path], tmp_path: Path) -> None:
    one = {"four": stub("--slots", "4")}
    sweep(write(configurations=one))
    before = {p.point_id: p.started for p in RunFiles(tmp_path / "out").read_points()}
    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "logs").iterdir()}
    sweep(write(configurations=one, title="Another title"))
    assert {p.point_id: p.started for p in RunFiles(tmp_path / "out").read_points()} == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "logs").iterdir()} == logs
    assert RunFiles(tmp_path / "out").read_summary().title == "Another title"


def test_a_configuration_that_fails_is_recorded_and_tried_again(write: Callable[..., Path], tmp_path: Path) -> None:
    flag = tmp_path / "works"
    script = f"test -e {flag} || {{ echo 'no memory left'; exit 3; }}; exec {stub('--slots', '2')['command']}"
    path = write(configurations={"shaky": {"command": f'sh -c "{script}"'}, "four": stub("--slots", "4")})
    summary = sweep(path)
    assert list(summary.failures) == ["shaky / short"]
    assert "no memory left" in summary.failures["shaky / short"]
    assert [a.configuration for a in summary.answers] == ["four"]
    before = {p.point_id: p.started for p in RunFiles(tmp_path / "out").read_points()}
    flag.touch()
    summary = sweep(path)
    assert not summary.failures
    assert {a.configuration for a in summary.answers} == {"four", "shaky"}
    after = {p.point_id: p.started for p in RunFiles(tmp_path / "out").read_points()}
    assert before.items() <= after.items()


def test_a_server_that_dies_under_load_is_a_failure_with_its_cause(write: Callable[..., Path]) -> None:
    summary = sweep(write(configurations={"mortal": stub("--exit-from", "8"), "four": stub("--slots", "4")}))
    assert list(summary.failures) == ["mortal / short"]
    assert "exit code 3" in summary.failures["mortal / short"]
    assert [a.configuration for a in summary.answers] == ["four"]


def test_a_vocabulary_that_is_not_told_must_be_given(write: Callable[..., Path]) -> None:
    silent = stub("--no-vocabulary")
    summary = sweep(write(configurations={"silent": silent, "said": silent | {"vocab_size": 500}}))
    assert "configurations.silent.vocab_size" in summary.failures["silent / short"]
    assert [a.configuration for a in summary.answers] == ["said"]


def test_the_ladder_has_the_same_rates_for_all_and_the_time_the_search_left(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minutes = 0.3
    limits: dict[str, float] = {}

    def watched(*given: Any, **named: Any) -> Any:
        limits[given[4]] = given[2].max_minutes
        return measure_ladder(*given, **named)

    monkeypatch.setattr("bench.sweep.measure_ladder", watched)
    summary = sweep(write(options={"precision": "60%", "max_minutes": minutes, "window": 0.25}))
    assert not summary.failures
    found = [a.rate for a in summary.answers if a.rate]
    ladder = summary.workloads["short"]["ladder_rates"]
    assert ladder == common_ladder(found)
    points = [p for p in RunFiles(tmp_path / "out").read_points() if p.phase == "ladder"]
    for name in ("four", "two"):
        rates = sorted(p.rate for p in points if p.configuration == name)
        assert len(rates) >= 2
        assert rates == ladder[: len(rates)], "time may run out, but the rates stay those of all"
    state = json.loads((tmp_path / "out" / STATE_FILE).read_text())
    assert sorted(state["ladders"]) == [["four", "short"], ["two", "short"]]
    for name, limit in limits.items():
        assert limit == pytest.approx(max(minutes - state["searched_s"][f"{name} / short"] / 60, minutes / 2))


def test_a_changed_sweep_is_refused_unless_fresh(write: Callable[..., Path], tmp_path: Path) -> None:
    one = {"four": stub("--slots", "4")}
    sweep(write(configurations={"four": stub("--refuse", "x")}))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    changed = write(configurations=one, options=OPTIONS | {"rates": [25]})
    with pytest.raises(BenchError, match=r"another version of this sweep.*--fresh"):
        sweep(changed)
    sweep(changed, fresh=True)
    assert {rate for _, phase, rate in measured(tmp_path / "out") if phase == "fixed"} == {25.0}
    assert (tmp_path / "out" / "notes.txt").exists()


def test_somebody_elses_results_are_not_touched(write: Callable[..., Path], tmp_path: Path) -> None:
    RunFiles(tmp_path / "out").write_summary(Summary("A bench run", 1, {}, {}))
    with pytest.raises(BenchError, match=r"other results.*--out"):
        sweep(write())


def test_fresh_removes_nothing_from_a_folder_that_holds_no_results(write: Callable[..., Path], tmp_path: Path) -> None:
    logs = tmp_path / "out" / "logs"
    logs.mkdir(parents=True)
    (logs / "important").write_text("mine")
    sweep(write(configurations={"four": stub("--refuse", "x")}), fresh=True)
    assert (logs / "important").read_text() == "mine"


def start(path: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cli.main", "sweep", str(path), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=Path(__file__).parents[2])


def wait_for_points(folder: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if len(RunFiles(folder).read_points()) >= count:
            return
        assert process.poll() is None, process.stdout.read().decode() if process.stdout else ""
        time.sleep(0.05)
    raise AssertionError("no points within 30 s")


def wait_for_state(folder: Path, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if (folder / STATE_FILE).exists():
            return
        assert process.poll() is None, process.stdout.read().decode() if process.stdout else ""
        time.sleep(0.05)
    raise AssertionError("no sign of life within 30 s")


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{pid}/stat") as f:
        return f.read().rsplit(")", 1)[1].split()[0] == "Z"


def assert_all_gone(pids: list[int]) -> None:
    for _ in range(200):
        if all(gone(pid) for pid in pids):
            return
        time.sleep(0.05)
    raise AssertionError(f"left behind: {pids}")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_sweep_killed_at_any_moment_goes_on(write: Callable[..., Path], tmp_path: Path) -> None:
    """Killed three times, each time at another moment after a first sign of life, then left alone."""
    path = write(options=OPTIONS | {"rates": [20, 30]})
    cut, moments = tmp_path / "cut", random.Random(os.getpid())
    kept: dict[str, str] = {}
    for _ in range(3):
        process = start(path, cut)
        try:
            wait_for_state(cut, process)
            time.sleep(moments.uniform(0.0, 2.5))
            servers = children(process.pid)
        finally:
            process.kill()
            process.communicate(timeout=30)
        assert_all_gone(servers)
        points = {p.point_id: p.started for p in RunFiles(cut).read_points() if p.valid}
        assert kept.items() <= points.items()
        kept = points
    summary = run_sweep(read_sweep(path), cut, QuietProgress())
    points = {p.point_id: p.started for p in RunFiles(cut).read_points()}
    assert kept.items() <= points.items()
    assert all(len(RunFiles(cut).read_requests(name)) for name in points)
    assert len(summary.answers) == 2
    whole = tmp_path / "whole"
    run_sweep(read_sweep(path), whole, QuietProgress())
    assert measured(cut) == measured(whole)
    assert sorted(points) == sorted(p.point_id for p in RunFiles(whole).read_points())


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c_keeps_everything_and_leaves_no_server(write: Callable[..., Path], tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    process = start(write(options=OPTIONS | {"rates": [20, 30], "window": 2}), cut)
    try:
        wait_for_points(cut, 2, process)
        servers = children(process.pid)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[0].decode()
    finally:
        process.kill()
    assert process.returncode == 130
    assert "the same command goes on" in said
    assert "waiting" in said, "the table of runs says what was not reached"
    assert_all_gone(servers)
    assert [p.phase for p in RunFiles(cut).read_points()][:2] == ["probe", "fixed"]
    state = json.loads((cut / STATE_FILE).read_text())
    assert state["searched_s"]["four / short"] > 0


@given(st.lists(st.floats(0.01, 1000), min_size=1, max_size=5))
def test_a_ladder_spans_what_was_found(found: list[float]) -> None:
    rates = common_ladder(found)
    assert rates == sorted(set(rates))
    assert 6 <= len(rates) <= 7
    assert rates[0] == pytest.approx(0.25 * min(found), rel=0.01)
    assert rates[-1] == pytest.approx(1.5 * max(found), rel=0.01)


def test_one_answer_gives_the_plain_ladder() -> None:
    assert common_ladder([4.0]) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_presets_are_whole_and_say_what_they_cost() -> None:
    plans = {name: read_sweep(path) for name, path in presets().items()}
    assert {"demo", "articles"} <= plans.keys()
    assert all(plan.description.endswith(".") for plan in plans.values())
    demo = plans["demo"]
    assert demo.most_minutes() <= 8
    assert [c.serve["enable-prefix-caching"] for c in demo.configurations] == [True, False]
    articles, short = plans["articles"], plans["articles-short"]
    assert [w.name for w in articles.workloads] == ["500/2000", "2048/128", "6000/4000"]
    assert short.most_minutes() <= 25
    proportions = [[w.spec["input"] / w.spec["output"] for w in p.workloads] for p in (articles, short)]
    assert proportions[0] == proportions[1]


def test_servers_get_a_model_length_of_their_workload() -> None:
    plain = Configuration("a", "m", {"enable_prefix_caching": False, "max-num-seqs": 16})
    assert plain.arguments(2500) == ["--no-enable-prefix-caching", "--max-num-seqs", "16", "--max-model-len", "2750"]
    given_length = Configuration("a", "m", {"max_model_len": 4096})
    assert given_length.arguments(2500) == ["--max-model-len", "4096"]
    foreign = Configuration("a", "org/m", command="vllm serve {model} --port {port} --max-model-len {max_model_len}")
    assert foreign.command_line(2500) == "vllm serve org/m --port {port} --max-model-len 2750"
    assert [model_len(n) for n in (10, 2500, 2176, 10000)] == [11, 2750, 2394, 11000]


def test_keys_stay_out_of_what_is_shown() -> None:
    ours = Configuration("a", "m", {}, api_key="s3cret")
    foreign = Configuration("a", "m", command="serve --api-key s3cret --port {port}", api_key="s3cret")
    assert ours.arguments(10)[-2:] == ["--api-key", "s3cret"]
    for configuration in (ours, foreign):
        assert "s3cret" not in json.dumps(configuration.describe()) + configuration.shown(10)


def test_workloads_may_have_options_and_a_name_of_their_own(write: Callable[..., Path]) -> None:
    own = SHORT | {"name": "fast", "max_minutes": 2, "limits": {"ttft_p99_ms": 500}}
    first, second = read_sweep(write(workloads=[SHORT, own])).workloads
    assert (first.options.max_minutes, second.options.max_minutes) == (0.5, 2.0)
    assert (first.options.limits, second.options.limits) == ({}, {"ttft_p99_ms": 500.0})
    assert second.options.rates == (30.0,)
    built = second.build(1000)
    assert built.name == "fast"
    assert built.max_tokens == 12
    assert len(built.requests(3, 1)) == 3


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"configurations": {}}, "configurations must hold at least one"),
        ({"configuration": {}}, "unknown field 'configuration'"),
        ({"configurations": {"a": {"serv": {}}}}, "configurations.a has an unknown field 'serv'"),
        ({"configurations": {"a": None}}, "configurations.a has neither a model to serve nor a command"),
        ({"configurations": {"a": 3}}, "configurations.a must hold fields"),
        ({"configurations": {"a": {"command": "serve"}}}, r"configurations.a.command must contain \{port\}"),
        ({"configurations": {"a": {"command": "x {port}", "serve": {}}}}, "either serve .* or command"),
        ({"model": "m", "configurations": {"a": {"serve": [1]}}}, "configurations.a.serve must hold flags"),
        ({"model": "m", "configurations": {"a": {"serve": {"x": [1]}}}}, "configurations.a.serve.x must be a single"),
        ({"model": "m", "configurations": {"a": {"serve": {"api_key": "k"}}}}, "put the key into configurations.a"),
        ({"model": "m", "configurations": {"a": {"vocab_size": "big"}}}, "configurations.a.vocab_size must be a whole"),
        ({"model": "m", "configurations": {"a": {"start_limit_s": 0}}}, "configurations.a.start_limit_s must be"),
        ({"workloads": {}}, "workloads must be a list"),
        ({"workloads": ["500/2000"]}, r"workloads\[0\] must hold fields"),
        ({"workloads": [{"kind": "random", "input": 5}]}, r"workloads\[0\]: .*output is missing"),
        ({"workloads": [SHORT, SHORT]}, "two workloads are called 'short'"),
        ({"seed": "one"}, "seed must be a whole number"),
        ({"options": {"speed": 1}}, "options has an unknown field 'speed'"),
        ({"options": {"precision": "huge"}}, "options.precision must be a share"),
        ({"options": {"precision": 20}}, "options.precision must be a share"),
        ({"options": {"max_minutes": -1}}, "options.max_minutes must be a number above 0"),
        ({"options": {"rates": 3}}, "options.rates must be a list"),
        ({"options": {"rates": [0]}}, "options.rates must be a number above 0"),
        ({"options": {"ladder": "yes"}}, "options.ladder must be true or false"),
        ({"options": {"limits": {"ttft": 1}}}, "options.limits has an unknown field 'ttft'"),
        ({"options": [1]}, "options must hold fields"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(write: Callable[..., Path], changed: dict[str, Any], said: str) -> None:
    with pytest.raises(BenchError, match=f"stubs.yaml: .*{said}"):
        read_sweep(write(**changed))


@pytest.mark.parametrize("text", ["a: [", "just words", "- 1", "\x00"])
def test_files_that_are_no_sweep(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(BenchError, match=r"odd\.yaml"):
        read_sweep(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="No such file"):
        read_sweep(tmp_path / "none.yaml")


def test_too_little_time_for_a_point_is_said(write: Callable[..., Path]) -> None:
    summary = sweep(write(configurations={"four": stub()}, options={"max_minutes": 0.3, "window": 60}))
    assert "one request alone takes 0.0" in summary.failures["four / short"]
    assert "raise max_minutes" in summary.failures["four / short"]


def test_workloads_that_ship_and_arrivals_of_their_own(write: Callable[..., Path], tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("timestamp,input_tokens,output_tokens\n0,9,3\n2,8,4\n")
    workloads = [
        {"preset": "visionarena-sample", "output": 32, "name": "pictures"},
        {"kind": "trace", "trace": str(trace)},
        {"kind": "random", "input": 5, "output": 5, "arrivals": "constant"},
    ]
    plan = read_sweep(write(workloads=workloads, options={"arrivals": "gamma", "burstiness": 0.5}))
    pictures, traced, constant = plan.workloads
    assert (pictures.name, pictures.needs_vocabulary) == ("pictures", False)
    assert pictures.build(None).describe()["output"] == 32
    assert (pictures.options.arrivals.kind, pictures.options.arrivals.burstiness) == ("gamma", 0.5)
    assert (traced.max_tokens, traced.options.arrivals.trace) == (12, str(trace))
    assert constant.options.arrivals.kind == "constant"
    for changed, words in (
        ({"workloads": [{"preset": "none"}]}, "no workload 'none'"),
        ({"options": {"arrivals": "odd"}}, "options: unknown kind of arrivals 'odd'"),
        ({"options": {"burstiness": 2}}, "options.burstiness needs arrivals: gamma"),
        ({"options": {"trace": "none.csv"}}, "none.csv: can't be read"),
    ):
        with pytest.raises(BenchError, match=words):
            read_sweep(write(**changed))
