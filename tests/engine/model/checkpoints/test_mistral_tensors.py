"""Checkpoints in Mistral's own format equal the model in transformers' format, in every way of loading."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.model.checkpoints import reader
from engine.model.checkpoints.mistral_tensors import InterleavedRows
from engine.model.checkpoints.reader import Reader
from engine.model.checkpoints.safetensors_headers import MISTRAL_INDEX, read_headers
from engine.model.loading.open_model import open_model
from engine.model.model_info import read_hf_config, read_model_info
from engine.model.resolve import resolve_model
from engine.model.sharding.shard_model import shard_model
from engine.model.sharding.tp_plan import plan_tensor_parallel
from tests.engine.model.checkpoints.mistral_files import build_mistral, interleaved
from tests.engine.model.sharding.thread_groups import make_groups
from tests.engine.worker.driver import WINDOWED, Driver, build_model
from tests.engine.worker.parity import CASES, Reference, compare, serve

YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "beta": 32.0, "alpha": 1.0}
ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
GROWING = {"original_max_position_embeddings": 16, "beta": 0.3}
MISTRAL: dict[str, Any] = {"sliding_window": None}

# Kinds of transformers, changes of their tiny configs, and what params.json has beside the sizes.
FORMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mistral": ("mistral", MISTRAL, {"sliding_window": None, "vision_encoder": None, "moe": None}),
    "window": ("mistral", {"sliding_window": 9}, {"sliding_window": 9}),
    "pattern": ("ministral", {}, {"sliding_window": [9, None, 9]}),
    "pattern repeated": (
        "ministral",
        {"num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2},
        {"_sliding_window": [4096, 9]},
    ),
    "experts": ("mixtral", {}, {"moe": {"num_experts": 4, "num_experts_per_tok": 2}}),
    "tied": ("mistral", {**MISTRAL, "tie_word_embeddings": True}, {"tied_embeddings": True}),
    "yarn": ("mistral", {**MISTRAL, "rope_parameters": {**ROPE}}, {"yarn": YARN}),
    "yarn unscaled": (
        "mistral",
        {**MISTRAL, "rope_parameters": {**ROPE, "attention_factor": 1.0}},
        {"yarn": {**YARN, "apply_scale": False}},
    ),
    "growing scores": (
        "ministral3",
        {"rope_parameters": {**ROPE, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.3}},
        {"yarn": {**YARN, "original_max_position_embeddings": 16}, "llama_4_scaling": GROWING},
    ),
}


def configured(folder: Path, **options: Any) -> EngineConfig:
    return EngineConfig(model=str(folder), dtype="float32", **options)


@pytest.mark.parametrize("form", FORMS)
def test_weights_and_config_are_those_of_transformers_class(form: str, tmp_path: Path) -> None:
    kind, changes, params = FORMS[form]
    model = build_mistral(kind, tmp_path, params, **changes)
    config = configured(tmp_path)
    model_info = read_model_info(config)
    assert model_info.architecture == type(model).__name__
    assert model_info.weight_bytes == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert (model_info.max_model_len, model_info.head_dim) == (256, read_hf_config(tmp_path, config).head_dim or 8)
    meta_model = open_model(config, model_info)
    meta_model.fill()
    wanted = model.state_dict()
    for name, value in meta_model.model.state_dict().items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("form", FORMS)
def test_they_are_served_as_transformers_computes(
    form: str, tmp_path: Path, make_driver: Callable[..., Driver]
) -> None:
    kind, changes, params = FORMS[form]
    reference = Reference(build_mistral(kind, tmp_path, params, **changes))
    driver = make_driver(tmp_path, kernels="torch")
    for case in ("alone", "chunked"):
        row = compare(form, case, serve(driver, case), reference)
        assert row.passed, row


def test_the_fused_stack_takes_them(tmp_path: Path, make_driver: Callable[..., Driver]) -> None:
    kind, changes, params = FORMS["window"]
    reference = Reference(build_mistral(kind, tmp_path, params, **changes))
    driver = make_driver(tmp_path, block_size=16)
    assert driver.executor.kernels.endswith("fused stack")
    for case in CASES:
        row = compare(kind, case, serve(driver, case), reference)
        assert row.passed, row


@pytest.mark.parametrize("form", FORMS)
def test_ranks_cut_them(form: str, tmp_path: Path) -> None:
    kind, changes, params = FORMS[form]
    model = build_mistral(kind, tmp_path, params, **changes)
    config = configured(tmp_path, tensor_parallel_size=2)
    model_info = read_model_info(config)
    tp_plan = plan_tensor_parallel(config, model_info)
    for group in make_groups(2):
        meta_model = open_model(config, model_info)
        shard_model(meta_model, tp_plan, group)
        meta_model.fill()
        mine, whole = meta_model.model.model.layers[1].self_attn, model.model.layers[1].self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            assert torch.equal(getattr(mine, name).weight, getattr(whole, name).weight.chunk(2)[group.rank]), name
        assert torch.equal(mine.o_proj.weight, whole.o_proj.weight.chunk(2, 1)[group.rank])


@settings(deadline=None)
@given(
    heads=st.integers(1, 5),
    half=st.integers(1, 4),
    columns=st.integers(1, 5),
    band=st.integers(1, 200),
    data=st.data(),
)
def test_any_part_of_paired_rows_is_read(heads: int, half: int, columns: int, band: int, data: st.DataObject) -> None:
    rows = heads * 2 * half
    wanted = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
    begin = data.draw(st.tuples(st.integers(0, rows - 1), st.integers(0, columns - 1)))
    shape = data.draw(st.tuples(st.integers(1, rows - begin[0]), st.integers(1, columns - begin[1])))
    with tempfile.TemporaryDirectory() as folder, patch.object(reader, "BAND", band):
        save_file({"a": interleaved(wanted, 2 * half)}, Path(folder) / "model.safetensors")
        out = torch.full(shape, -1.0)
        source = Reader()
        source.copy(InterleavedRows(read_headers(Path(folder), "m")["a"], 2 * half), begin, out)
        source.close()
    assert torch.equal(out, wanted[begin[0] : begin[0] + shape[0], begin[1] : begin[1] + shape[1]])


def test_weights_in_eight_bits_are_what_they_stand_for(tmp_path: Path) -> None:
    build_mistral("mistral", tmp_path)
    file, stored, said = tmp_path / "consolidated.safetensors", {}, {}
    for name, value in load_file(file).items():
        if value.ndim == 2 and name.startswith("layers"):
            scale = value.abs().max() / 400
            linear, rounded = name.removesuffix("weight"), (value / scale).to(torch.float8_e4m3fn)
            said[name] = rounded.float() * scale
            stored |= {name: rounded, f"{linear}qscale_weight": scale, f"{linear}qscale_act": torch.tensor(0.7)}
        else:
            stored[name] = said[name] = value.to(torch.bfloat16)
    assert len(said) < len(stored)
    loaded = []
    quantization = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    params = json.loads((tmp_path / "params.json").read_text())
    for tensors, more in ((said, {}), (stored, {"quantization": quantization})):
        save_file(tensors, file)
        (tmp_path / "params.json").write_text(json.dumps(params | more))
        meta_model = open_model(configured(tmp_path), read_model_info(configured(tmp_path)))
        meta_model.fill()
        loaded.append(meta_model.model.state_dict())
    assert read_model_info(EngineConfig(model=str(tmp_path))).dtype == "bfloat16"
    for name, value in loaded[1].items():
        torch.testing.assert_close(value, loaded[0][name], rtol=1e-6, atol=1e-7)


def test_a_checkpoint_in_several_files_is_read_by_its_index(tmp_path: Path) -> None:
    model = build_mistral("mistral", tmp_path)
    whole = load_file(tmp_path / "consolidated.safetensors")
    (tmp_path / "consolidated.safetensors").unlink()
    names = sorted(whole)
    places = {name: f"consolidated-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: whole[name] for name in names if places[name] == file}, tmp_path / file)
    (tmp_path / MISTRAL_INDEX).write_text(json.dumps({"weight_map": places}))
    config = configured(tmp_path)
    meta_model = open_model(config, read_model_info(config))
    meta_model.fill()
    assert torch.equal(
        meta_model.model.model.layers[2].self_attn.q_proj.weight, model.model.layers[2].self_attn.q_proj.weight
    )


def test_where_both_forms_are_the_mode_decides(tmp_path: Path) -> None:
    native = build_mistral("mistral", tmp_path, {"norm_eps": 0.25})
    theirs = build_model("llama", tmp_path)
    assert read_model_info(configured(tmp_path)).architecture == "LlamaForCausalLM"
    assert read_model_info(configured(tmp_path, tokenizer_mode="mistral")).architecture == "MistralForCausalLM"
    for mode, model in (("auto", theirs), ("mistral", native)):
        config = configured(tmp_path, tokenizer_mode=mode)
        meta_model = open_model(config, read_model_info(config))
        meta_model.fill()
        assert torch.equal(meta_model.model.lm_head.weight, model.lm_head.weight)
    (tmp_path / "consolidated.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no weights \(consolidated\.safetensors\): --tokenizer-mode auto reads its"):
        read_model_info(configured(tmp_path, tokenizer_mode="mistral"))


def test_a_folder_without_weights_says_what_it_has(tmp_path: Path) -> None:
    build_mistral("mistral", tmp_path)
    (tmp_path / "consolidated.safetensors").rename(tmp_path / "consolidated.00.pth")
    assert resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(ModelError, match=r"consolidated\.pth, which can't be read: convert it to safetensors"):
        read_model_info(configured(tmp_path))
    assert read_model_info(configured(tmp_path, load_format="dummy", num_layers=1)).num_layers == 1


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"multimodal": {"whisper_model_args": {"encoder_args": {"dim": 8}}}}, "takes audio (multimodal)"),
        ({"vision_encoder": {"hidden_size": 8}}, "vision_encoder lacks image_size, patch_size"),
        ({"model_type": "mamba"}, "its model_type is 'mamba'; only 'transformer'"),
        ({"q_lora_rank": 16, "kv_lora_rank": 8}, "it has kv_lora_rank, q_lora_rank, which isn't supported"),
        ({"sliding_window": [9, 12, None]}, "windows of 2 lengths (sliding_window)"),
        ({"sliding_window": [9, None]}, "3 layers can't repeat the 2 windows"),
        (
            {"moe": {"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1}},
            "its moe has num_shared_experts",
        ),
        (
            {"moe": {"num_experts": 4, "num_experts_per_tok": 2}, "sliding_window": [9, 9, None]},
            "experts (moe) together with windows",
        ),
        ({"yarn": {**YARN, "gamma": 2}}, "its yarn has gamma"),
        ({"yarn": YARN, "llama_4_scaling": GROWING}, "differ in original_max_position_embeddings"),
        ({"llama_4_scaling": GROWING, "sliding_window": [9, 9, None]}, "llama_4_scaling together with windows"),
        ({"quantization": {"qformat_weight": "nvfp4"}}, "quantized as nvfp4, which isn't supported; fp8_e4m3 is"),
        ({"quantization": {"quant_method": "bitsandbytes"}}, "quantized with bitsandbytes"),
        ({"dim": None}, "params.json can't be read: it lacks dim"),
        ({"n_layers": 0}, "params.json can't be read: n_layers must be at least 1, not 0"),
        ({"dim": "32"}, 'params.json can\'t be read: dim must be an integer, not the string "32"'),
        ({"norm_eps": "x"}, 'params.json can\'t be read: norm_eps must be a number, not the string "x"'),
        ({"yarn": {**YARN, "factor": "four"}}, "params.json can't be read: could not convert"),
    ],
)
def test_what_is_not_read_is_refused_with_the_reason(params: dict[str, Any], says: str, tmp_path: Path) -> None:
    build_mistral("mistral", tmp_path, {"sliding_window": None, **params}, **MISTRAL)
    with pytest.raises(ModelError) as caught:
        read_model_info(configured(tmp_path))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_params_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{")
    with pytest.raises(ModelError, match=r"params\.json can't be read"):
        read_model_info(configured(tmp_path))


def test_what_params_leave_out_is_as_in_mistral_s_code(tmp_path: Path) -> None:
    build_mistral("mistral", tmp_path, {"rope_theta": None, "max_seq_len": None})
    config = read_hf_config(tmp_path, configured(tmp_path))
    assert (config.max_position_embeddings, config.rope_parameters["rope_theta"]) == (128_000, 1e6)


assert WINDOWED["sliding_window"] == 9  # as the forms above suppose of the ministral kind
