"""Plain configs are what transformers' classes make of the same files, and unusual files are left to the classes."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.engine_plan import plan_engine
from engine.kernels.cpu import build
from engine.model.config.config_json import read_config_json
from engine.model.config.plain_config import KINDS, PlainConfig, plain_config
from engine.model.families import FAMILIES
from engine.model.loading.outline import PARTS
from engine.model.model_info import read_model_info
from engine.worker.worker_start import start_worker
from tests.engine.worker.driver import build_model

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
# What Redline reads of the config of a text decoder. A test below finds out whether it reads anything else.
READ = (
    "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "attention_bias", "mlp_bias", "hidden_act", "rope_parameters", "sliding_window", "layer_types", "head_dim",
    "quantization_config", "kv_lora_rank", "vision_config", "audio_config", "is_encoder_decoder", "is_causal",
    "use_bidirectional_attention", "auto_map", "moe_intermediate_size", "num_experts_per_tok", "no_rope_layers",
    "original_max_position_embeddings", "dtype",
)  # fmt: skip
# Fields of transformers' classes that not all of them have, with what stands for them where they are not set.
UNSET = {"attention_bias": False, "mlp_bias": False, "is_encoder_decoder": False}


def values(config: Any) -> dict[str, Any]:
    found = {name: getattr(config, name, None) for name in READ}
    if found["head_dim"] is None:
        found["head_dim"] = config.hidden_size // config.num_attention_heads
    for name, value in UNSET.items():
        found[name] = value if found[name] is None else found[name]
    dtype = found["dtype"]
    return found | {"dtype": dtype and str(dtype).removeprefix("torch.")}


def write(folder: Path, fields: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@st.composite
def usual_files(draw: st.DrawFn) -> dict[str, Any]:
    """Fields as published files have them."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    kv_heads, queries, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([8, 16]))
    heads = kv_heads * queries
    fields = LLAMA | {
        "model_type": kind, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "hidden_size": 2 * heads * draw(st.integers(1, 20)), "num_hidden_layers": draw(st.integers(1, 5)),
    }  # fmt: skip
    theta = {"rope_theta": draw(st.sampled_from([10000, 10000.0, 5e5]))}
    scaling = draw(st.sampled_from([{"rope_type": "default"}, LLAMA3]))
    del fields["rope_theta"]
    fields |= draw(
        st.sampled_from(
            [
                {"rope_parameters": scaling | theta},
                {"rope_parameters": scaling | theta, "rope_scaling": None},
                {"rope_parameters": scaling} | theta,
                {"rope_scaling": scaling | theta},
                {"rope_scaling": scaling, "rope_parameters": None} | theta,
                {"rope_scaling": scaling} | theta,
                {"rope_scaling": None} | theta,
                {"rope_scaling": {}, "rope_parameters": {}} | theta,
                theta,
            ]
        )
    )
    optional = {
        "head_dim": head_dim, "tie_word_embeddings": draw(st.booleans()), "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()), "hidden_act": "silu", "use_cache": True, "initializer_range": 0.02,
        draw(st.sampled_from(["dtype", "torch_dtype"])): draw(st.sampled_from(["bfloat16", "float16", "float32"])),
        "eos_token_id": draw(st.sampled_from([None, 2, [2, 3]])), "bos_token_id": 1, "pad_token_id": None,
        "attention_dropout": draw(st.sampled_from([0, 0.0, 0.1])), "transformers_version": "4.40.0",
        "rope_interleaved": False, "is_llama_config": True, "transformers.js_config": {"dtype": "q4"},
        "pretraining_tp": 1, "unk_token_id": 0,
    }  # fmt: skip
    if kind == "mistral":
        fields["sliding_window"] = draw(st.sampled_from([None, 0, 9]))
    elif kind != "llama":
        optional |= {"use_sliding_window": False, "sliding_window": draw(st.sampled_from([None, 9]))}
        optional |= {"max_window_layers": draw(st.integers(0, 5))}
        optional |= {"layer_types": ["full_attention"] * fields["num_hidden_layers"]}
    kept = draw(st.sets(st.sampled_from(sorted(optional))))
    kept |= {"head_dim"} if kind == "qwen3" else set()
    return fields | {name: optional[name] for name in kept}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(usual_files())
def test_usual_files_are_read_as_the_class_reads_them(tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = write(tmp_path, fields)
    plain = read_config_json(folder, "it", plain=True)
    assert isinstance(plain, PlainConfig)
    assert values(plain) == values(read_config_json(folder, "it"))
    assert plain.get_text_config(decoder=True) is plain


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "smollm3"}, {"model_type": "mistral"}, {"model_type": None}, {"model_type": ["llama"]},
        {"hidden_size": 64.0}, {"head_dim": 5}, {"hidden_size": 60},
        {"hidden_size": True}, {"hidden_size": 0}, {"hidden_size": 65}, {"num_key_value_heads": 3},
        {"num_key_value_heads": None}, {"rms_norm_eps": 1}, {"rms_norm_eps": float("nan")}, {"rope_theta": None},
        {"rope_theta": "10000"}, {"rope_theta": 0}, {"rope_theta": float("inf")}, {"rope_theta": float("nan")},
        {"num_hidden_layers": 10**12}, {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_parameters": {"rope_type": "yarn"}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, {"hidden_act": "gelu"},
        {"rope_parameters": LLAMA3, "rope_scaling": LLAMA3}, {"rope_scaling": {"type": "llama3"}},
        {"rope_scaling": LLAMA3 | {"factor": 0.5}}, {"rope_scaling": LLAMA3 | {"factor": True}},
        {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, {"rope_scaling": LLAMA3 | {"low_freq_factor": 0}},
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 256}}, {"rope_scaling": {"rope_type": []}},
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 64}, {"rope_scaling": [1]},
        {"rope_scaling": {name: value for name, value in LLAMA3.items() if name != "factor"}},
        {"model_type": "mistral", "sliding_window": -1},
        {"model_type": "mistral", "sliding_window": 1, "layer_types": []},
        {"architectures": []}, {"architectures": ["LlamaModel"]}, {"architectures": ["LlamaForCausalLM", 1]},
        {"dtype": "float8_e4m3fn"}, {"dtype": "bfloat16", "torch_dtype": "float32"}, {"dtype": "auto"},
        {"auto_map": {"AutoConfig": "own.Own"}}, {"quantization_config": {"quant_method": "gptq"}},
        {"eos_token_id": [2, 3.0]}, {"eos_token_id": "2"}, {"initializer_range": 2.0}, {"sliding_window": 9},
        {"model_type": "qwen3"}, {"model_type": "qwen2", "use_sliding_window": True},
        {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}, {"is_causal": False},
        {"num_labels": 3}, {"head_dim": None}, {"head_dim": 0}, {"attention_bias": "yes"}, {"attn_implementation": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_unusual_files_are_left_to_the_class(changes: dict[str, Any]) -> None:
    assert plain_config(LLAMA) is not None
    assert plain_config(LLAMA | changes) is None


@pytest.mark.parametrize("missing", sorted(LLAMA.keys() - {"model_type"}))
def test_fields_that_are_missing_are_left_to_the_class(missing: str) -> None:
    assert plain_config({name: value for name, value in LLAMA.items() if name != missing}) is None


def test_plain_configs_are_of_models_whose_classes_are_not_needed() -> None:
    assert KINDS.keys() <= PARTS.keys()
    assert all(FAMILIES[kind].fused for kind in KINDS)


# What models of a type must have so that their files are usual ones.
FIELDS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3 | {"rope_theta": 10000.0}},
    "mistral": {},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
}


class Recording(PlainConfig):
    """A plain config that keeps the names of all fields that are asked for."""

    asked: ClassVar[set[str]] = set()

    def __getattribute__(self, name: str) -> Any:
        Recording.asked.add(name)
        return super().__getattribute__(name)


def record(fields: dict[str, Any]) -> PlainConfig:
    found = plain_config(fields)
    assert found is not None, "this file is a usual one"
    return Recording(**vars(found))


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("options", [{}, {"quantization": "int4"}, {"max_model_len": 64, "dtype": "float16"}], ids=str)
def test_what_is_known_of_a_model_is_the_same(
    kind: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    build_model(kind, tmp_path, **{**rope, "head_dim": 16, "tie_word_embeddings": True, **FIELDS[kind]})
    config = EngineConfig(model=str(tmp_path), **options)
    monkeypatch.setattr("engine.model.config.config_json.plain_config", record)
    Recording.asked.clear()
    found = read_model_info(config)
    assert Recording.asked
    monkeypatch.setattr("engine.model.config.config_json.plain_config", lambda _: None)
    assert read_model_info(config) == found


@pytest.mark.skipif(not build.supported_isas(), reason="the CPU kernels need AVX2 or NEON")
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_nothing_else_is_read_of_a_config(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    build_model(kind, tmp_path, **{**rope, **sizes, **FIELDS[kind]})
    monkeypatch.setattr("engine.model.config.config_json.plain_config", record)
    Recording.asked.clear()
    config = EngineConfig(model=str(tmp_path), device="cpu", kv_cache_memory_bytes=1 << 22, max_num_seqs=2)
    plan = plan_engine(config)
    _, report = start_worker(plan.config, plan.model_info, plan.resolution.config)
    assert "fused stack" in report.kernels
    methods = {"get_text_config"}
    assert {name for name in Recording.asked if not name.startswith("__")} <= {*READ, *methods}
