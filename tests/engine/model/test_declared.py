"""What simulated hardware knows of a model is what the model's class says."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.data import known_models
from engine.errors import ConfigError, ModelError
from engine.model.declared import divide_declared, read_declared, stored_quantization
from engine.model.model_info import read_model_info

TEXT = ("llama-3.1-8b", "llama-3.1-70b", "qwen3-8b", "qwen3-14b", "qwen3-32b")
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 256,
}  # fmt: skip


def configure(model: str, **options: Any) -> EngineConfig:
    return EngineConfig(model=model, device="sim:h100", **options)


def write(folder: Path, **changes: Any) -> str:
    fields = {key: value for key, value in {**LLAMA, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "max_model_len": 4096}])
def test_as_the_class_of_the_model_has_it(name: str, options: dict[str, Any]) -> None:
    declared = read_declared(configure(name, **options))
    of_class = read_model_info(EngineConfig(model=str(known_models()[name]), load_format="dummy", **options))
    assert declared.weight_bytes == pytest.approx(of_class.weight_bytes, rel=1e-3)
    assert dataclasses.replace(declared, weight_bytes=0) == dataclasses.replace(of_class, weight_bytes=0)


@pytest.mark.parametrize("name", ["qwen2-vl-small", "molmo-small"])
def test_models_with_encoders_are_read_by_their_class(name: str) -> None:
    declared = read_declared(configure(name))
    assert declared.mm is not None
    assert declared.mm.spec.most_tokens["image"] > 0
    assert declared.dtype == "bfloat16"


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys\nfrom engine.config import EngineConfig\nfrom engine.engine_plan import plan_engine\n"
        "plan_engine(EngineConfig(model='llama-3.1-8b', device='sim:h100'))\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_bytes_of_weights_and_of_the_cache(tmp_path: Path) -> None:
    model = write(tmp_path, tie_word_embeddings=True)
    linears, vocabulary = 2 * (64 * (2 * 64 + 2 * 32) + 3 * 64 * 128), 100 * 64
    plain, fp8 = read_declared(configure(model)), read_declared(configure(model, quantization="fp8"))
    assert plain.weight_bytes == 2 * (linears + vocabulary)
    assert fp8.weight_bytes == linears + 2 * vocabulary
    assert plain.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2
    stored = read_declared(configure(write(tmp_path, quantization_config={"quant_method": "fp8"})))
    assert (stored.stored_fp8, plain.stored_fp8) == (True, False)
    assert stored.weight_bytes == linears + 2 * 2 * vocabulary


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (None, ""),
        ({"quant_method": "fbgemm_fp8"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"bits": 4}, "an unknown format"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"type": "float", "num_bits": 8}}}},
         "fp8"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"type": "int", "num_bits": 4}}}},
         "compressed-tensors"),
    ],
)  # fmt: skip
def test_formats_of_checkpoints(found: dict[str, Any] | None, expected: str) -> None:
    assert stored_quantization(found) == expected


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"model_type": "mamba"}, {}, ModelError, r"no times for .*, a model of type 'mamba'; .* llama, mistral"),
        ({"hidden_size": "64"}, {}, ModelError, r"Expected `int`, got `str` - at `\$.hidden_size`"),
        ({"hidden_size": None}, {}, ModelError, "missing required field `hidden_size`"),
        ({"num_key_value_heads": 3}, {}, ModelError, "must be a multiple of num_key_value_heads"),
        ({"model_type": "mistral", "sliding_window": 128}, {}, ConfigError, "use --max-model-len 128 or less"),
        ({"quantization_config": {"quant_method": "awq"}}, {}, ModelError, "no times for weights stored as awq"),
        ({}, {"quantization": "compressed-tensors"}, ConfigError, "can quantize them to fp8"),
        ({}, {"dtype": "float32"}, ConfigError, "computes in bfloat16 or float16"),
        ({}, {"runner": "pooling"}, ModelError, "returns vectors"),
        ({"architectures": ["LlamaModel"]}, {}, ModelError, "returns vectors"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, {"max_model_len": 257}, ConfigError,
            "more than the 256 positions",
        ),
    ],
)  # fmt: skip
def test_models_without_known_times(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_declared(configure(write(tmp_path, **changes), **options))


def test_fields_of_older_files_and_overrides(tmp_path: Path) -> None:
    model = write(tmp_path, torch_dtype="float16", rope_scaling={"type": "linear", "factor": 2.0})
    found = read_declared(configure(model))
    assert (found.dtype, found.max_model_len) == ("float16", 512)
    overridden = read_declared(configure(model, hf_overrides={"rope_parameters": {"rope_type": "default"}}))
    assert overridden.max_model_len == 256
    float32 = read_declared(configure(write(tmp_path, torch_dtype="float32")))
    assert float32.dtype == "bfloat16"
    assert "stored in float32" in float32.warnings[0]


def test_ranks_divide_a_model() -> None:
    config = configure("llama-3.1-70b", tensor_parallel_size=4)
    whole = read_declared(config)
    divided = divide_declared(config, whole)
    assert divided.weight_bytes == pytest.approx(whole.weight_bytes, rel=1e-6)
    rank = divided.rank_info
    assert (rank.num_heads, rank.num_kv_heads, rank.intermediate_size) == (16, 2, 7168)
    assert rank.kv_bytes_per_token * 4 == whole.kv_bytes_per_token


def test_more_ranks_than_heads_of_keys_repeat_these(tmp_path: Path) -> None:
    config = configure(write(tmp_path), tensor_parallel_size=4)
    whole = read_declared(config)
    rank = divide_declared(config, whole).rank_info
    assert (rank.num_kv_heads, rank.kv_bytes_per_token * 2) == (1, whole.kv_bytes_per_token)


def test_ranks_that_do_not_divide_the_heads() -> None:
    config = configure("llama-3.1-8b", tensor_parallel_size=3)
    with pytest.raises(ConfigError, match=r"--tp 3 .* 32 heads, .* over 1, 2, 4, 8, 16 ranks"):
        divide_declared(config, read_declared(config))


def test_ranks_of_a_model_with_an_encoder() -> None:
    config = configure("molmo-small", tensor_parallel_size=2)
    whole = read_declared(config)
    divided = divide_declared(config, whole)
    assert divided.weight_bytes > whole.weight_bytes  # each rank has the tower
    assert divided.rank_info.num_heads * 2 == whole.num_heads


def test_errors_name_the_model_as_it_was_given() -> None:
    path = str(known_models()["molmo-small"])
    config = configure(path, tensor_parallel_size=16, served_model_name="mine")
    with pytest.raises(ConfigError, match=r"^mine can't be divided among ranks \(--tp 16\)"):
        divide_declared(config, read_declared(config))
