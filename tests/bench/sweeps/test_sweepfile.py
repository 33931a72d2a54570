"""What a sweep's file says, and what is wrong in it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.errors import BenchError
from bench.sweeps.configurations import Configuration, model_len
from bench.sweeps.sweepfile import presets, read_sweep
from engine.config import ABLATIONS, EngineConfig

SHORT = {"kind": "random", "input": 8, "output": 4, "name": "short"}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a sweep; keywords replace its fields."""

    def put(**changed: Any) -> Path:
        data = {
            "title": "Stubs",
            "configurations": {"four": {"command": "stub --port {port}"}},
            "workloads": [SHORT],
            "options": {"rates": [30], "window": 0.4, "max_minutes": 0.5, "precision": "20%"},
        }
        path = tmp_path / "stubs.yaml"
        path.write_text(yaml.safe_dump(data | changed, sort_keys=False))
        return path

    return put


def test_presets_are_whole_and_say_what_they_cost() -> None:
    plans = {name: read_sweep(path) for name, path in presets().items()}
    assert {"demo", "articles"} <= plans.keys()
    assert all(plan.description.endswith(".") for plan in plans.values())
    demo = plans["demo"]
    assert demo.max_minutes() <= 8
    assert [c.serve["enable-prefix-caching"] for c in demo.configurations] == [True, False]
    articles, short = plans["articles"], plans["articles-short"]
    assert [w.name for w in articles.workloads] == ["500/2000", "2048/128", "6000/4000"]
    assert short.max_minutes() <= 25
    proportions = [[w.spec["input"] / w.spec["output"] for w in p.workloads] for p in (articles, short)]
    assert proportions[0] == proportions[1]


def test_presets_of_v0_take_their_time_and_cover_what_they_say() -> None:
    plans = {name: read_sweep(path) for name, path in presets().items()}
    versus, ablation = plans["v0-v1"], plans["ablation"]
    assert versus.max_minutes() <= 55
    assert ablation.max_minutes() <= 150
    assert [w.name for w in versus.workloads] == [w.name for w in plans["articles-short"].workloads]
    assert [c.arguments(80) for c in versus.configurations] == [
        ["--max-num-batched-tokens", "128", "--max-model-len", "88"],
        ["--engine", "v0", "--max-model-len", "88"],
    ]
    # Three need images and a broadcast several ranks; everything else that can be taken away is.
    others = ("inline-processing", "no-feature-cache", "no-encoder-cache", "driver-broadcast")
    removed = [c.serve.get("ablate") for c in ablation.configurations]
    assert removed == [None, *(r for r in ABLATIONS if r not in others), None]
    assert [c.name for c in ablation.configurations] == ["v1", *removed[1:-1], "v0"]
    assert all(c.note for c in ablation.configurations)
    for configuration in (c for p in (versus, ablation) for c in p.configurations):
        settings = {flag.replace("-", "_"): value for flag, value in configuration.serve.items()}
        if "ablate" in settings:
            settings["ablate"] = (settings["ablate"],)
        EngineConfig(model="m", **settings)  # the engine takes them together


def test_common_flags_may_be_replaced_and_taken_away(write: Callable[..., Path]) -> None:
    configurations = {
        "a": {"serve": {"max_num_seqs": 8, "ablate": ["no-chunking", "watermark"]}, "note": "two ablations"},
        "b": {"serve": {"max-num-seqs": None}},
        "c": {"command": "stub --port {port}"},
    }
    common = {"--max-num-seqs": 16, "dtype": "float32"}
    a, b, c = read_sweep(write(model="m", serve=common, configurations=configurations)).configurations
    assert a.arguments(10)[:-2] == ["--max-num-seqs", "8", "--dtype", "float32", "--ablate", "no-chunking,watermark"]
    assert b.arguments(10)[:-2] == ["--dtype", "float32"]
    assert c.serve == {}
    assert (a.describe()["note"], "note" in b.describe()) == ("two ablations", False)


def test_a_ladder_of_its_own(write: Callable[..., Path]) -> None:
    ladders = [w.options.ladder for w in read_sweep(write(workloads=[
        SHORT, SHORT | {"name": "b", "ladder": False}, SHORT | {"name": "c", "ladder": [1, 0.5]},
    ])).workloads]  # fmt: skip
    assert ladders == [True, False, (0.5, 1.0)]


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
        ({"configurations": {}}, "configurations must have at least one"),
        ({"configuration": {}}, "unknown field 'configuration'"),
        ({"configurations": {"a": {"serv": {}}}}, "configurations.a has an unknown field 'serv'"),
        ({"configurations": {"a": None}}, "configurations.a needs one of model, command or url"),
        ({"configurations": {"a": 3}}, "configurations.a must have fields"),
        ({"configurations": {"a": {"command": "serve"}}}, r"configurations.a.command must contain \{port\}"),
        ({"configurations": {"a": {"command": "x {port}", "serve": {}}}}, "use serve .* or command"),
        ({"model": "m", "configurations": {"a": {"serve": [1]}}}, "configurations.a.serve must have flags"),
        ({"model": "m", "configurations": {"a": {"serve": {"x": [[1]]}}}}, "configurations.a.serve.x must be a single"),
        ({"model": "m", "serve": {"x": {"y": 1}}, "configurations": {"a": None}}, "serve.x must be a single"),
        ({"model": "m", "serve": {"api-key": "k"}, "configurations": {"a": None}}, "put the key into configurations.a"),
        ({"model": "m", "configurations": {"a": {"serve": {"api_key": "k"}}}}, "put the key into configurations.a"),
        ({"model": "m", "configurations": {"a": {"vocab_size": "big"}}}, "configurations.a.vocab_size must be an"),
        ({"model": "m", "configurations": {"a": {"energy_gpus": "0-1"}}}, "configurations.a.energy_gpus must be all"),
        ({"model": "m", "configurations": {"a": {"start_limit_s": 0}}}, "configurations.a.start_limit_s must be"),
        ({"workloads": {}}, "workloads must be a list"),
        ({"workloads": ["500/2000"]}, r"workloads\[0\] must have fields"),
        ({"workloads": [{"kind": "random", "input": 5}]}, r"workloads\[0\]: .*output is missing"),
        ({"workloads": [SHORT, SHORT]}, "two workloads are named 'short'"),
        ({"seed": "one"}, "seed must be an integer"),
        ({"options": {"speed": 1}}, "options has an unknown field 'speed'"),
        ({"options": {"precision": "huge"}}, "options.precision must be a value such as 10%"),
        ({"options": {"precision": 20}}, "options.precision must be a value such as 10%"),
        ({"options": {"max_minutes": -1}}, "options.max_minutes must be a number above 0"),
        ({"options": {"rates": 3}}, "options.rates must be a list"),
        ({"options": {"rates": [0]}}, "options.rates must be a number above 0"),
        ({"options": {"search": "first", "ladder": False}}, "options.search is first, which needs a ladder"),
        ({"options": {"search": "second"}}, "options.search must be all or first"),
        ({"options": {"ladder": "yes"}}, "options.ladder must be true, false or a list"),
        ({"options": {"ladder": [0.5, -1]}}, "options.ladder must be a number above 0"),
        ({"options": {"limits": {"ttft": 1}}}, "options.limits has an unknown field 'ttft'"),
        ({"options": [1]}, "options must have fields"),
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
        ({"workloads": [{"preset": "none"}]}, "unknown workload 'none'"),
        ({"options": {"arrivals": "odd"}}, "options: unknown kind of arrivals 'odd'"),
        ({"options": {"burstiness": 2}}, "options.burstiness needs arrivals: gamma"),
        ({"options": {"trace": "none.csv"}}, "none.csv cannot be read"),
    ):
        with pytest.raises(BenchError, match=words):
            read_sweep(write(**changed))


def test_a_trace_of_all_workloads_gives_lengths_too(write: Callable[..., Path], tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("timestamp,input_tokens,output_tokens\n0,5,2\n250000,6,3\nx,1,1\n")
    options = {"rates": [1], "trace": str(trace), "trace_unit": "ms", "skip_bad_rows": True}
    (workload,) = read_sweep(write(workloads=[{"kind": "trace"}], options=options)).workloads
    assert workload.spec == {"kind": "trace", "trace": str(trace), "trace_unit": "ms", "skip_bad_rows": True}
    assert workload.max_tokens == 9
    assert workload.options.arrivals.read_trace().times.tolist() == [0, 250]
    own = [{"kind": "trace", **{key: options[key] for key in ("trace", "trace_unit", "skip_bad_rows")}}]
    (workload,) = read_sweep(write(workloads=own)).workloads
    assert workload.build(1000).requests(2, 0)[1].output_tokens == 3
    for wrong, words in (
        ([{"kind": "trace"}], r"workloads\[0\]: workload trace: the field trace is missing"),
        ([SHORT | {"trace_unit": "ms"}], "trace_unit needs trace"),
        ([SHORT | {"trace": str(trace)}], "row 3 has no number.*--skip-bad-rows"),
        ([SHORT | {"trace": str(trace), "trace_unit": 5}], "trace_unit must be a name"),
        ([SHORT | {"trace": str(trace), "skip_bad_rows": "yes"}], "skip_bad_rows must be true or false"),
    ):
        with pytest.raises(BenchError, match=words):
            read_sweep(write(workloads=wrong))


def test_simulated_configurations_have_limits_of_their_own(write: Callable[..., Path]) -> None:
    configurations = {
        "real": {"model": "m"}, "h100": {"model": "m", "serve": {"device": "sim:h100"}, "note": "a few words"},
    }  # fmt: skip
    plan = read_sweep(write(configurations=configurations))
    assert [c.is_simulated for c in plan.configurations] == [False, True]
    assert not plan.is_simulated
    assert plan.workloads[0].options.max_virtual_minutes == 1440
    measured = read_sweep(write(configurations={"real": {"model": "m"}}))
    assert plan.max_minutes() == measured.max_minutes()
    assert "--device sim:h100" in plan.configurations[1].shown(100)


def test_one_device_for_all_replaces_those_of_the_file(write: Callable[..., Path]) -> None:
    configurations = {"a": {"serve": {"device": "cpu", "tp": 2}}, "b": None}
    plan = read_sweep(write(model="m", serve={"device": "cuda"}, configurations=configurations), "sim:b200")
    assert [c.serve for c in plan.configurations] == [{"device": "sim:b200", "tp": 2}, {"device": "sim:b200"}]
    with pytest.raises(BenchError, match=r"configurations.four.command: --device sim:b200 needs Redline's own"):
        read_sweep(write(), "sim:b200")


def test_fields_about_servers_are_refused_on_simulated_hardware(write: Callable[..., Path]) -> None:
    entry = {"model": "m", "serve": {"device": "sim:h100"}}
    for key, value in {"api_key": "k", "headers": {"a": "b"}, "energy_gpus": "all", "vocab_size": 100}.items():
        with pytest.raises(BenchError, match=rf"configurations.x.{key} has no meaning on simulated hardware"):
            read_sweep(write(configurations={"x": entry | {key: value}}))


SMALL = {**SHORT, "name": "a", "model": "small", "serve": {"tp": 2}, "configurations": ["v1"]}
LARGE = {**SHORT, "name": "b", "model": "large", "serve": {"tp": 4}, "offline": 9, "requests": False}
OF_MODELS = {"configurations": {"v0": {"serve": {"engine": "v0", "tp": 8}}, "v1": {}}, "serve": {"max-num-seqs": 8}}


def test_workloads_may_have_models_flags_and_configurations_of_their_own(write: Callable[..., Path]) -> None:
    plan = read_sweep(write(**OF_MODELS, workloads=[SMALL, LARGE]))
    small, large = plan.workloads
    (only,) = plan.of_workload(small)
    assert (only.name, only.model, only.serve) == ("v1", "small", {"max-num-seqs": 8, "tp": 2})
    v0, v1 = plan.of_workload(large)
    assert (v0.name, v0.model, v0.serve) == ("v0", "large", {"max-num-seqs": 8, "tp": 8, "engine": "v0"})
    assert v1.serve == {"max-num-seqs": 8, "tp": 4}
    assert (small.options.offline, large.options.offline) == (None, 9)
    assert (small.options.requests, large.options.requests) == (True, False)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"configurations": ["v2"]}, r"workloads\[0\].configurations must be a list .*v0, v1"),
        ({"offline": 0}, r"workloads\[0\].offline must be an integer of at least 1"),
        ({"requests": "some"}, r"workloads\[0\].requests must be true or false"),
        ({"serve": [1]}, r"workloads\[0\].serve must have flags and their values"),
        ({"model": None}, "configurations.v0 needs one of model, command or url"),
    ],
)
def test_wrong_fields_of_workloads_are_named(write: Callable[..., Path], changed: dict[str, Any], error: str) -> None:
    with pytest.raises(BenchError, match=error):
        read_sweep(write(**OF_MODELS, workloads=[SMALL | changed, LARGE]))


def test_presets_for_simulated_hardware_take_the_place_of_others_of_their_name() -> None:
    plan = read_sweep(presets(simulated=True)["articles"], "sim:h100")
    assert plan.is_simulated
    assert plan.name == "articles"
    models = {workload.model for workload in plan.workloads}
    assert {"meta-llama/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.3-70B-Instruct"} <= models
    for workload in plan.workloads:
        by_name = {one.name: one for one in plan.of_workload(workload)}
        assert by_name["v0"].serve["engine"] == "v0"
        assert by_name["v1"].serve["enable-prefix-caching"] is False
        assert "--device" in by_name["v1"].arguments(workload.max_tokens)
    assert presets()["articles"] != presets(simulated=True)["articles"]
    assert presets()["demo"] == presets(simulated=True)["demo"]
