"""Commands as they are printed for vLLM: what `redline serve` makes of their flags."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import cli.serve
from cli.engine_options import ENGINE_OPTIONS
from cli.main import main
from cli.options import GroupedOption
from cli.serve_options import SERVER_OPTIONS
from cli.vllm_options import FOREIGN, NO_EFFECT, REFUSED, Foreign
from engine.config import AUTO_LENGTH, EngineConfig

ROOT = Path(__file__).resolve().parents[2]


class Asked:
    """What the command line would have started."""

    config: EngineConfig
    serving: Any
    notes: list[str]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    found = Asked()

    def keep(config: EngineConfig, serving: Any, notes: list[str]) -> int:
        found.config, found.serving, found.notes = config, serving, notes
        return 0

    monkeypatch.setattr(cli.serve, "serve", keep)
    return found


def run(*arguments: str) -> None:
    assert main(["serve", *arguments]) == 0


def assert_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *said: str) -> None:
    assert main(["serve", "m", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("redline: error: ")
    assert error.count("\n") == 1
    for words in said:
        assert words in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["m", "--served-model-name", "a", "b"],
        ["m", "--served_model_name", "a", "b", "--port", "1"],
        ["--served-model-name", "a", "b", "m"],
        ["--port", "1", "--served-model-name", "a", "b", "--seed", "3", "m"],
        ["m", "--served-model-name", "a", "--served-model-name", "b"],
        ["m", "--served-model-name=a", "--served-model-name", "b"],
        ["--model", "m", "--served-model-name", "a", "b"],
        ["--served-model-name", "a", "b", "--", "m"],
    ],
)
def test_several_names_of_the_model(arguments: list[str], asked: Asked) -> None:
    run(*arguments)
    assert asked.config.model == "m"
    assert asked.config.names == ("a", "b")


@pytest.mark.parametrize("written", ["image=4,video=1", '{"image": 4, "video": 1}', "image=4, video=1"])
def test_limits_of_multimodal_inputs(written: str, asked: Asked) -> None:
    run("m", "--limit-mm-per-prompt", written)
    assert asked.config.per_prompt == {"image": 4, "video": 1}
    assert asked.config.media_limits is None


def test_sources_and_limits_of_media(asked: Asked, tmp_path: Path) -> None:
    run(
        "m", "--allowed-local-media-path", str(tmp_path), "--allowed-media-domains", "a.example", "b.example",
        "--allowed-media-networks", "10.1.0.0/16", "--max-media-bytes", "5MiB", "--video-frames", "8",
    )  # fmt: skip
    options = asked.config.media_options
    assert (options.local_path, options.domains) == (str(tmp_path), ("a.example", "b.example"))
    assert options.networks == ("10.1.0.0/16",)
    assert (options.limits.max_bytes, options.limits.video_frames) == (5 << 20, 8)
    assert options.limits.max_image_pixels == 64 << 20


def test_one_name_before_the_model_stays_one(asked: Asked) -> None:
    run("--served-model-name", "a", "m")
    assert (asked.config.model, asked.config.names) == ("m", ("a",))


def test_adapters_of_one_flag_also_as_json(asked: Asked) -> None:
    run("m", "--enable-lora", "--lora-modules", "a=/a", json.dumps({"name": "b", "path": "/b", "base_model_name": "m"}))
    assert asked.config.adapters == (("a", "/a"), ("b", "/b"))
    assert asked.notes == ["--enable-lora has no effect: adapters given by --lora are served without it"]


@pytest.mark.parametrize(
    ("written", "length"),
    [("-1", AUTO_LENGTH), ("auto", AUTO_LENGTH), ("32768", 32768), ("32k", 32000), ("32K", 32768), ("25.6k", 25600)],
)
def test_lengths_as_vllm_takes_them(written: str, length: int, asked: Asked) -> None:
    run("m", "--max-model-len", written)
    assert asked.config.max_model_len == length
    run("m", f"--max-model-len={written}")
    assert asked.config.max_model_len == length


def test_aliases_of_types_and_formats(asked: Asked) -> None:
    run("m", "--dtype", "half", "--kv-cache-dtype", "auto", "-q", "awq", "-asc", "2", "--no-enable-log-requests")
    assert (asked.config.dtype, asked.config.kv_cache_dtype) == ("float16", None)
    assert (asked.config.quantization, asked.config.stored_quantization) == (None, "awq")
    assert (asked.serving.api_servers, asked.serving.log_requests) == (2, False)
    run("m", "--tokenizer_mode", "mistral", "--config_format", "mistral", "--load_format", "mistral")
    assert (asked.config.tokenizer_mode, asked.config.load_format, asked.notes) == ("mistral", "auto", [])
    run("m", "--load-format", "mistral")
    assert asked.config.tokenizer_mode == "mistral"
    assert len(asked.notes) == 1


def test_the_scaling_of_qwens_instructions(asked: Asked) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    run("m", "--rope-scaling", json.dumps(scaling), "--max-model-len", "131072")
    assert asked.config.hf_overrides == {"rope_scaling": scaling}
    run("m", "--hf-overrides", json.dumps({"rope_parameters": scaling}), "--rope-theta", "1e6")
    assert asked.config.hf_overrides == {"rope_parameters": scaling, "rope_theta": 1e6}


def test_a_chat_template_from_a_file_or_as_it_is(asked: Asked, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages }}")
    for given in (str(file), "{{ messages }}"):
        run("m", "--chat-template", given)
        assert asked.config.chat_template == "{{ messages }}"


@pytest.mark.parametrize("flags", [["--num-scheduler-steps", "8"], ["--enable-chunked-prefill"]])
def test_an_option_of_v0_falls_back_to_v0_and_says_so(flags: list[str], asked: Asked) -> None:
    run("m", *flags)
    assert asked.config.engine == "v0"
    assert len(asked.notes) == 1
    assert flags[0] in asked.notes[0]
    assert "--engine v0" in asked.notes[0]
    run("m", *flags, "--engine", "v0")
    assert asked.notes == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--engine", "v1", "--num-scheduler-steps", "8"], "--num-scheduler-steps is an option of V0"),
        (["--served-model-name", ""], "--served-model-name"),
        (["--max-model-len", "-2"], "-2"),
        (["--max-model-len", "lots"], "lots"),
        (["--chat-template", "/no/such/file"], "--chat-template: '/no/such/file' can't be read: No such file"),
        (["--hf-overrides", "{"], "--hf-overrides is not valid JSON"),
        (["--rope-scaling", "[]"], "--rope-scaling must be a JSON object"),
        (["--rope-theta", "1", "--hf-overrides", '{"rope_theta": 2}'], "both give rope_theta"),
        (["--lora-modules", "{"], "is not valid JSON"),
        (["--lora-modules", '{"name": "a"}'], "NAME=PATH"),
        (["--trust-remote-code"], "--trust-remote-code is not supported: code that comes with a model is never run"),
        (["--pipeline-parallel-size", "0"], "--pp must be at least 1"),
        (["-pp", "2", "--ablate", "full-state"], "--pp 2 does not work with --ablate full-state"),
        (["--distributed-executor-backend", "ray"], "(--tp, --pp), or runs replicas there (--dp): give one"),
        (["--distributed-executor-backend", "external_launcher"], "'external_launcher' is not one of"),
        (["--ray-address", "10.0.0.1:6379"], "--ray-address needs --distributed-executor-backend ray"),
        (["--nnodes", "2"], "other machines are nodes of a Ray cluster"),
        (["--task", "embed"], "--task embed is not supported: use --runner and --convert"),
        (["--pooler-config", '{"pooling": "MEAN"}'], "--pooler-config has no field pooling: there are pooling_type"),
        (["--pooler-config", '{"pooling_type": "MAX"}'], "pooling_type must be one of MEAN, CLS, LAST"),
        (["--speculative-config", "{}"], "--speculative ngram"),
    ],
)
def test_what_cannot_be_had_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(capsys, arguments, said)


def given(foreign: Foreign, name: str) -> list[str]:
    return [name, "5"] if foreign.takes_value else [name]


@pytest.mark.parametrize("foreign", NO_EFFECT, ids=lambda one: one.name)
def test_flags_without_effect_say_so(foreign: Foreign, asked: Asked) -> None:
    for name in (name.partition("/")[0] for name in foreign.names):
        run("m", *given(foreign, name))
        assert len(asked.notes) == 1
        assert foreign.name in asked.notes[0]
        assert "has no effect: " in asked.notes[0]
    for value in foreign.neutral:
        run("m", foreign.name, value)
        assert asked.notes == []


@pytest.mark.parametrize("foreign", REFUSED, ids=lambda one: one.name)
def test_flags_that_cannot_be_had_name_the_reason(
    foreign: Foreign, asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (name.partition("/")[0] for name in foreign.names):
        assert_refused(capsys, given(foreign, name), f"{foreign.name}", f"is not supported: {foreign.why}")
    for value in foreign.neutral:
        run("m", foreign.name, value)
        assert asked.notes == []


def test_flags_that_are_switched_off_ask_for_nothing(asked: Asked) -> None:
    run("m", "--no-trust-remote-code", "--no-enforce-eager", "--no-enable-lora")
    assert asked.notes == []


def test_lists_after_a_flag_without_effect(asked: Asked) -> None:
    run("m", "--cudagraph-capture-sizes", "1", "2", "4", "-O3", "--swap-space", "4.5")
    assert [note.partition(" ")[0] for note in asked.notes] == [
        "--cudagraph-capture-sizes", "--compilation-config", "--swap-space",
    ]  # fmt: skip


def test_the_page_lists_every_flag_of_vllm_and_what_it_does() -> None:
    page = (ROOT / "docs" / "serving" / "flags.md").read_text()
    rows = dict(re.findall(r"^\| `(--[\w-]+)[^|]*\| (implemented|no effect|refused)", page, re.MULTILINE))
    assert len(rows) >= 100
    for foreign in FOREIGN:
        assert rows.pop(foreign.name) == ("refused" if foreign.refused else "no effect"), foreign.name
    assert set(rows.values()) == {"implemented"}
    declared = {name for one in cli.serve.command.params if isinstance(one, GroupedOption) for name in one.opts}
    assert set(rows) <= declared
    assert len(SERVER_OPTIONS) + len(ENGINE_OPTIONS) + len(FOREIGN) <= len(cli.serve.command.params)
