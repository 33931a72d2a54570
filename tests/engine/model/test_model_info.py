"""What is known of a model before it is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.config import EngineConfig
from engine.errors import ConfigError, ModelError
from engine.model.model_info import read_model_info

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
PARAMETERS = 100 * 32 + 32 + 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 64 * 3 + 2 * 32)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors")
    return folder


def info(folder: Path, **options: Any):
    return read_model_info(EngineConfig(model=str(folder), **options))


def test_shapes_and_sizes(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(7, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}
    found = info(write(tmp_path, LLAMA, tensors))
    assert (found.architecture, found.dtype, found.vocab_size) == ("LlamaForCausalLM", "bfloat16", 100)
    assert (found.num_layers, found.num_heads, found.num_kv_heads, found.head_dim) == (2, 4, 2, 8)
    assert found.weight_bytes == 26 * 2  # as loaded: bfloat16; the kernels do not support heads of 8 elements
    assert found.kv_bytes_per_token == 2 * 2 * 2 * 8 * 2
    assert found.max_model_len == 128
    assert found.warnings == ()


def test_shards_are_found_through_the_index(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(6)}, tmp_path / "model-00002-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert info(write(tmp_path, LLAMA)).weight_bytes == 20


def test_dummy_weights_are_counted_from_the_class(tmp_path: Path) -> None:
    assert info(write(tmp_path, LLAMA), load_format="dummy").weight_bytes == PARAMETERS * 2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4"])
def test_weights_are_counted_as_the_fused_stack_holds_them(form: str, tied: bool, tmp_path: Path) -> None:
    """Against what is packed."""
    from engine.model.loading.open_model import open_model
    from engine.worker import fused_stack

    options = {} if form == "bfloat16" else {"quantization": form}
    write(tmp_path, LLAMA | {"hidden_size": 64, "vocab_size": 96, "head_dim": 16, "tie_word_embeddings": tied})
    config = EngineConfig(model=str(tmp_path), load_format="dummy", **options)
    found = read_model_info(config)
    form_of = fused_stack.StackFormats("bfloat16", form, "bfloat16")
    meta_model = open_model(config, found)
    _, kept = fused_stack.make_spec(
        meta_model.model, form_of, 1, 16, found.kv_groups, partial=False, fill=meta_model.fill
    )
    packed = sum(tensor.nbytes for tensor in kept if isinstance(tensor, torch.Tensor) and tensor.dtype != torch.float32)
    norms = (2 * 2 + 1) * 64 * 2  # as the checkpoint has them; the stack has them in float32
    assert found.weight_bytes == packed + norms


def test_fewer_layers_only_with_dummy_weights(tmp_path: Path) -> None:
    write(tmp_path, LLAMA, {"a": torch.zeros(4)})
    assert info(tmp_path, load_format="dummy", num_layers=1).num_layers == 1
    with pytest.raises(ConfigError, match="--num-layers needs --load-format dummy"):
        info(tmp_path, num_layers=1)


def test_the_dtype_is_the_flags_then_the_configs_then_the_tensors(tmp_path: Path) -> None:
    write(tmp_path, LLAMA, {"a": torch.zeros(4, dtype=torch.float16)})
    assert info(tmp_path, dtype="float32").dtype == "float32"
    assert info(tmp_path).dtype == "bfloat16"
    write(tmp_path, {name: value for name, value in LLAMA.items() if name != "dtype"})
    assert info(tmp_path).dtype == "float16"


def test_a_length_beyond_the_models_positions_is_a_warning_where_plain_rope_allows_it(tmp_path: Path) -> None:
    write(tmp_path, LLAMA, {"a": torch.zeros(4)})
    assert info(tmp_path, max_model_len=64).warnings == ()
    longer = info(tmp_path, max_model_len=129)
    assert longer.max_model_len == 129
    assert "--max-model-len 129 exceeds the 128 positions" in longer.warnings[0]


def test_a_length_beyond_the_models_positions_is_refused_where_positions_end(tmp_path: Path) -> None:
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    write(tmp_path, {**LLAMA, "rope_parameters": linear}, {"a": torch.zeros(4)})
    assert info(tmp_path, max_model_len=256).warnings == ()
    with pytest.raises(ConfigError, match="--max-model-len 257 is more than the 256 positions"):
        info(tmp_path, max_model_len=257)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "falcon"}, "its own attention mask"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "no_such_kind"}, "no_such_kind"),
        ({"model_type": "idefics2"}, "images"),
        ({"model_type": "qwen3_next"}, "linear_attention"),
        ({"model_type": "deepseek_v2"}, "latent attention"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "of type dynamic"),
        ({"quantization_config": {"quant_method": "quanto", "bits": 4}}, "quantized with quanto"),
    ],
)
def test_models_that_the_path_cannot_run_are_refused_with_the_reason(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    write(tmp_path, {**LLAMA, **change}, {"a": torch.zeros(4)})
    with pytest.raises(ModelError) as caught:
        info(tmp_path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_untested_kind_is_named_in_a_warning(tmp_path: Path) -> None:
    write(tmp_path, {**LLAMA, "model_type": "arcee"}, {"a": torch.zeros(4)})
    assert "arcee" in info(tmp_path).warnings[0]


def test_a_folder_without_weights_is_refused_unless_dummy(tmp_path: Path) -> None:
    write(tmp_path, LLAMA)
    with pytest.raises(ModelError, match="--load-format dummy"):
        info(tmp_path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    write(tmp_path, LLAMA)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0nonsense")
    with pytest.raises(ModelError, match=r"model\.safetensors is missing or isn't a safetensors file"):
        info(tmp_path)
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(ModelError, match=r"config\.json can't be read"):
        info(tmp_path)
