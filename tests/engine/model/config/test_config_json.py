"""config.json as published: other types than the class declares, rope scaling in all its spellings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError, ModelError
from engine.model.config.config_json import read_config_json
from engine.model.loading.open_model import open_model
from engine.model.model_info import read_model_info
from tests.engine.worker.driver import BASE, MODELS

LONG = {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1, 3, 7, 9]}
YARN = {"type": "yarn", "factor": 4}
LLAMA3 = {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
ORIGINAL = "original_max_position_embeddings"


def write(folder: Path, kind: str, text_of: Any = json.dumps, **fields: Any) -> str:
    config = {**BASE, **MODELS[kind], "model_type": kind}
    for rope in ("rope_parameters", ORIGINAL):
        config.pop(rope, None)
    config |= fields
    (folder / "config.json").write_text(text_of(config))
    return str(folder)


def read(folder: Path, kind: str, **fields: Any) -> Any:
    return read_config_json(folder, write(folder, kind, **fields))


@pytest.mark.parametrize(
    ("kind", "field", "written", "meant"),
    [
        ("gemma2", "final_logit_softcapping", 30, 30.0),
        ("gemma2", "attn_logit_softcapping", 50, 50.0),
        ("deepseek_v3", "routed_scaling_factor", 1, 1.0),
        ("llama", "rms_norm_eps", 1, 1.0),
        ("llama", "initializer_range", 1, 1.0),
        ("cohere2", "logit_scale", 1, 1.0),
        ("llama", "num_hidden_layers", 2.0, 2),
        ("llama", "max_position_embeddings", 1.28e2, 128),
        ("llama", "head_dim", 16.0, 16),
        ("mistral", "sliding_window", 64.0, 64),
        ("llama", "eos_token_id", [2.0, 3], [2, 3]),
        ("llama", "rope_scaling", {**YARN, ORIGINAL: 64.0}, {**YARN, ORIGINAL: 64}),
        ("gpt2", "n_positions", 256.0, 256),
    ],
)  # fmt: skip
def test_whole_numbers_and_fractions_are_taken_for_each_other(
    kind: str, field: str, written: Any, meant: Any, tmp_path: Path
) -> None:
    """As transformers reads the same file with the number that is meant."""
    from transformers import AutoConfig

    found = read(tmp_path, kind, **{field: written})
    write(tmp_path, kind, **{field: meant})
    theirs = AutoConfig.from_pretrained(tmp_path).to_dict()
    ours = found.to_dict()
    if field == "rope_scaling":
        ours.pop(ORIGINAL)  # which we have beside the scaling too
    assert ours == theirs
    value = getattr(found, "rope_parameters" if field == "rope_scaling" else field)
    if field == "rope_scaling":
        assert type(value[ORIGINAL]) is int
        assert value[ORIGINAL] == 64
    else:
        assert value == meant
        assert type(value) is type(meant)


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, not 0"),
        ("gpt2", {"n_layer": 0}, "n_layer must be at least 1, not 0"),
        ("llama", {"hidden_size": -64}, "hidden_size must be at least 1, not -64"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads must be at least 1, not 0"),
        ("llama", {"vocab_size": 0}, "vocab_size must be at least 1, not 0"),
        ("llama", {"max_position_embeddings": 0}, "max_position_embeddings must be at least 1, not 0"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads (4) must be a multiple of num_key_value_heads (3)"),
        ("llama", {"num_hidden_layers": "2"}, 'num_hidden_layers must be an integer, not the string "2"'),
        ("llama", {"num_hidden_layers": 2.5}, "num_hidden_layers must be an integer, not 2.5"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers must be an integer, not true"),
        ("llama", {"num_hidden_layers": None}, "num_hidden_layers must be an integer, not null"),
        ("llama", {"rms_norm_eps": "1e-5"}, 'rms_norm_eps must be a number, not the string "1e-5"'),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number, not NaN"),
        ("llama", {"rope_theta": "10000"}, 'rope_theta must be a number, not the string "10000"'),
        (
            "llama",
            {"tie_word_embeddings": "false"},
            'tie_word_embeddings must be true or false, not the string "false"',
        ),
        ("llama", {"architectures": "X"}, 'architectures must be a list, not the string "X"'),
        ("llama", {"hidden_act": "nope"}, "hidden_act must be an activation function"),
        ("llama", {"torch_dtype": "float33"}, "torch_dtype must be a type such as bfloat16, not 'float33'"),
        ("llama", {"quantization_config": [1]}, "quantization_config must be an object, not [1]"),
        (
            "llama",
            {"quantization_config": {"quant_method": "gptq", "bits": "4"}},
            'quantization_config.bits must be an integer, not the string "4"',
        ),
        ("llama", {"rope_scaling": "linear"}, 'rope_scaling must be an object, not the string "linear"'),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": "4"}},
            'rope_scaling.factor must be a number, not the string "4"',
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 0}},
            "rope_scaling.factor must be greater than 0, not 0",
        ),
        ("llama", {"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing"),
        ("llama", {"model_type": None}, "model_type is missing"),
        ("llama", {"model_type": ["llama"]}, 'model_type must be a string, not ["llama"]'),
        ("llama", {"hidden_size": 65}, "hidden size (65) is not a multiple"),
        ("qwen2", {"layer_types": ["full_attention"]}, "must be equal to the number of `layer_types` (1)"),
        ("mistral", {"sliding_window": "64"}, 'sliding_window must be an integer, not the string "64"'),
    ],
)
def test_what_a_model_cannot_have_is_one_line_that_names_the_field(
    kind: str, fields: dict[str, Any], says: str, tmp_path: Path
) -> None:
    name = write(tmp_path, kind, **fields)
    with pytest.raises(ModelError) as caught:
        read_model_info(EngineConfig(model=name, load_format="dummy"))
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"{name}: config.json can't be used: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "7", '"llama"', "{", "\xff\xfe", "[" * 100_000])
def test_what_is_no_config_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json can't be read: ") as caught:
        read_config_json(tmp_path, "some/model")
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    write(tmp_path, "llama", text_of=lambda config: "\ufeff" + json.dumps(config))
    assert read_config_json(tmp_path, "m").num_hidden_layers == BASE["num_hidden_layers"]


@pytest.mark.parametrize(
    ("kind", "fields", "length"),
    [
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0, ORIGINAL: 256}}, 1024),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4}}, 1024),
        (
            "qwen2",
            {"max_position_embeddings": 1024, "rope_scaling": {"rope_type": "yarn", "factor": 4, ORIGINAL: 256}},
            1024,
        ),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.5}}, 640),
        (
            "llama",
            {"rope_scaling": {**LLAMA3, ORIGINAL: 32}},
            256,
        ),
        ("olmo3", {"rope_scaling": {"rope_type": "yarn", "factor": 8, ORIGINAL: 64}}, 512),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 256),
        ("gpt_oss", {"rope_scaling": {"rope_type": "yarn", "factor": 32, ORIGINAL: 32, "truncate": False}}, 1024),
        ("deepseek_v3", {"rope_scaling": {"type": "yarn", "factor": 40, ORIGINAL: 32, "mscale": 1}}, 1280),
    ],
)  # fmt: skip
def test_scaled_positions_are_as_many_as_the_scaling_makes(
    kind: str, fields: dict[str, Any], length: int, tmp_path: Path
) -> None:
    """And the rotary embedding is what transformers makes of the same file."""
    from transformers import AutoConfig, AutoModelForCausalLM

    name = write(tmp_path, kind, **fields)
    config = EngineConfig(model=name, load_format="dummy")
    model_info = read_model_info(config)
    assert model_info.max_model_len == length
    assert not any("exceeds" in warning for warning in model_info.warnings)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
    assert rotary_embeddings(open_model(config, model_info).model) == rotary_embeddings(theirs)
    with pytest.raises(ConfigError, match=f"more than the {length} positions"):
        read_model_info(EngineConfig(model=name, load_format="dummy", max_model_len=length + 1))


def rotary_embeddings(model: Any) -> dict[str, Any]:
    """Frequencies, and by what cosines and sines are multiplied."""
    found: dict[str, Any] = {n: b.tolist() for n, b in model.named_buffers() if n.endswith("inv_freq")}
    for name, module in model.named_modules():
        found |= {f"{name}.{key}": value for key, value in vars(module).items() if key.endswith("attention_scaling")}
    assert len(found) >= 2
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": {"type": "su", **LONG}, ORIGINAL: 64},
        {"rope_scaling": {"rope_type": "su", **LONG}, ORIGINAL: 64},
        {"rope_scaling": {"type": "yarn", **LONG}, ORIGINAL: 64},
        {"rope_scaling": {"type": "longrope", **LONG}, ORIGINAL: 64},
        {"rope_scaling": {"type": "longrope", ORIGINAL: 64, **LONG}},
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, ORIGINAL: 64, **LONG}},
        {"model_type": "llama", "rope_scaling": {"type": "longrope", **LONG}, ORIGINAL: 64},
    ],
)
@pytest.mark.parametrize("limit", [64, 2048])
def test_all_spellings_of_longrope_are_one(fields: dict[str, Any], limit: int, tmp_path: Path) -> None:
    """Against transformers' functions on the spelling that transformers reads right."""
    from transformers import Phi3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    name = write(tmp_path, "phi3", max_position_embeddings=2048, **fields)
    config = EngineConfig(model=name, load_format="dummy", max_model_len=limit)
    model_info = read_model_info(config)
    model = open_model(config, model_info).model
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **LONG}
    theirs = Phi3Config(**{**BASE, "max_position_embeddings": 2048, ORIGINAL: 64}, rope_parameters=rope)
    frequencies, scale = ROPE_INIT_FUNCTIONS["longrope"](theirs, torch.device("cpu"), limit)
    [rotary] = [module for module in model.modules() if hasattr(module, "inv_freq")]
    assert rotary.inv_freq.tolist() == frequencies.tolist()
    assert rotary.attention_scaling == scale
    assert any("--max-model-len 64 selects the short ones" in warning for warning in model_info.warnings) == (
        limit > 64
    )


def test_qwen2s_instructions_for_long_texts(tmp_path: Path) -> None:
    scaling = {"factor": 4.0, ORIGINAL: 32768, "type": "yarn"}
    name = write(tmp_path, "qwen2", max_position_embeddings=32768, rope_scaling=scaling)
    for wanted in (None, 131_072):
        assert (
            read_model_info(EngineConfig(model=name, load_format="dummy", max_model_len=wanted)).max_model_len
            == 131_072
        )


def test_fields_that_the_user_changes(tmp_path: Path) -> None:
    """As vLLM's --hf-overrides: an object replaces the whole of the file's, under either name of rope scaling."""
    name = write(tmp_path, "qwen2", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    scaling = {"rope_type": "yarn", "factor": 4, ORIGINAL: 256, "rope_theta": 1e6}
    for key in ("rope_scaling", "rope_parameters"):
        config = EngineConfig(model=name, load_format="dummy", hf_overrides={key: scaling, "num_hidden_layers": 1.0})
        found = read_model_info(config)
        assert (found.max_model_len, found.num_layers) == (1024, 1)
    with pytest.raises(ModelError, match="num_hidden_layers must be at least 1, not 0"):
        read_model_info(EngineConfig(model=name, load_format="dummy", hf_overrides={"num_hidden_layers": 0}))


@pytest.mark.parametrize(
    ("stored", "wanted", "says"),
    [
        (None, "awq", "not quantized; here they can be quantized to int8 or int4"),
        ("gptq", "awq", "stored as gptq"),
        ("gptq", "gptq_marlin", None),
        ("compressed-tensors", "compressed-tensors", None),
        ("fp8", "fp8", None),
        (None, "fp8", "not quantized; here they can be quantized to int8 or int4"),
    ],
)
def test_the_format_that_is_asked_for_must_be_the_stored_one(
    stored: str | None, wanted: str, says: str | None, tmp_path: Path
) -> None:
    weights = {"num_bits": 4, "symmetric": True}
    quantized = {
        "quant_method": stored,
        "bits": 4,
        "format": "pack-quantized",
        "config_groups": {"a": {"weights": weights}},
    }
    name = write(tmp_path, "llama", **({"quantization_config": quantized} if stored else {}))
    config = EngineConfig(model=name, load_format="dummy", quantization=wanted).checks_stored()
    if says is None:
        assert read_model_info(config).num_layers == BASE["num_hidden_layers"]
    else:
        with pytest.raises(ConfigError, match=says):
            read_model_info(config)
