"""Outlines of decoders are what transformers' classes are, as far as the kernels see them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.config import EngineConfig
from engine.kernels.cpu.packing import LANES
from engine.model.families import FAMILIES
from engine.model.loading.meta_model import MetaModel, first_paths
from engine.model.loading.open_model import open_model
from engine.model.loading.outline import PARTS, RotaryEmbedding, open_outline
from engine.model.model_info import read_model_info
from engine.worker import fused_stack
from engine.worker.fused_stack import StackFormats
from tests.engine.worker.driver import build_model

THETA = {"rope_theta": 5000.0}
LINEAR = {"rope_type": "linear", "factor": 4.0, **THETA}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **THETA}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, **THETA,
}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0, **THETA}
DEFAULT = {"rope_type": "default", **THETA}

CASES: dict[str, dict[str, Any]] = {
    "plain": {"rope_parameters": DEFAULT},
    "tied": {"tie_word_embeddings": True, "rope_parameters": DEFAULT},
    "biases": {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    "wide heads": {"head_dim": 16, "rope_parameters": YARN},
    "linear scaling": {"rms_norm_eps": 1e-3, "rope_parameters": LINEAR},
}
WEIGHTS = "model.safetensors"


def both(folder: Path, **options: Any) -> tuple[MetaModel, MetaModel | None]:
    """The class and the outline of a folder."""
    config = EngineConfig(model=str(folder), **options)
    model_info = read_model_info(config)
    return open_model(config, model_info), open_outline(config, model_info)


def outline_of(folder: Path, **options: Any) -> MetaModel | None:
    return both(folder, **options)[1]


def values(meta_model: MetaModel) -> dict[str, Any]:
    """What kernels read of a model besides its parameters."""
    decoder, rotary = meta_model.decoder, meta_model.decoder.model.rotary_emb
    layers = decoder.model.layers
    modules = {path: module for path, module in decoder.named_modules() if hasattr(module, "variance_epsilon")}
    return {
        "epsilons": {path: module.variance_epsilon for path, module in modules.items()},
        "attention": [
            (one.self_attn.head_dim, one.self_attn.scaling, int(getattr(one.self_attn, "use_rope", 1)))
            for one in layers
        ],
        "frequencies": (rotary.inv_freq.dtype, rotary.inv_freq.tolist(), rotary.attention_scaling),
        "first": first_paths(dict(decoder.named_parameters(remove_duplicate=False))),
        "base": (decoder.base_model_prefix, decoder.base_model is decoder.model),
        "embeddings": [
            meta_model.path(module) for module in (decoder.get_input_embeddings(), decoder.get_output_embeddings())
        ],
        "linears": {
            path: (module.in_features, module.out_features)
            for path, module in decoder.named_modules()
            if isinstance(module, torch.nn.Linear)
        },
        "float32": meta_model._float32.pattern,
    }


def test_every_family_that_the_kernels_compute_has_an_outline() -> None:
    assert PARTS.keys() == {kind for kind, family in FAMILIES.items() if family.fused}


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("kind", sorted(PARTS))
def test_an_outline_has_what_the_class_has(kind: str, case: str, tmp_path: Path) -> None:
    build_model(kind, tmp_path, **CASES[case])
    whole, outline = both(tmp_path, dtype="bfloat16")
    assert outline is not None
    assert values(outline) == values(whole)
    assert all(parameter.is_meta for parameter in outline.model.parameters())
    whole.fill()
    outline.fill()
    wanted, found = whole.model.state_dict(), outline.model.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@given(
    st.sampled_from([8, 64, 96, 128]),
    st.sampled_from([10000, 1e4, 5e5, 1e6]),
    st.integers(1, 40),
    st.sampled_from([1, 1.0, 2.5]),
    st.sampled_from([3, 4.0, 32.5]),
    st.sampled_from([64, 8192]),
)
def test_frequencies_are_those_of_transformers_to_the_bit(
    head_dim: int, theta: float, factor: int, low: float, high: float, original: int
) -> None:
    default = {"rope_type": "default", "rope_theta": theta}
    llama3 = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    llama3 |= {"original_max_position_embeddings": original, "rope_theta": theta}
    sizes = {"hidden_size": 512, "num_attention_heads": 4, "head_dim": head_dim, "max_position_embeddings": 9000}
    for parameters in (default, llama3):
        config = LlamaConfig(**sizes, rope_parameters=parameters)
        wanted, found = LlamaRotaryEmbedding(config), RotaryEmbedding(config)
        assert torch.equal(found.inv_freq, wanted.inv_freq)
        assert found.inv_freq.dtype == wanted.inv_freq.dtype
        assert found.attention_scaling == wanted.attention_scaling


@pytest.mark.parametrize("kind", sorted(PARTS))
def test_kernels_refuse_an_outline_as_they_refuse_the_class(kind: str, tmp_path: Path) -> None:
    build_model(kind, tmp_path, hidden_act="gelu", mlp_bias=True)
    whole, outline = both(tmp_path)
    assert outline is not None
    formats = StackFormats("float32", "float32", "float32")
    refused = fused_stack.refusal(outline.decoder, formats, LANES)
    assert refused == fused_stack.refusal(whole.decoder, formats, LANES) == "its activation is gelu"


def test_progress_is_that_of_the_class(tmp_path: Path) -> None:
    build_model("llama", tmp_path, tie_word_embeddings=True)
    config = EngineConfig(model=str(tmp_path))
    model_info = read_model_info(config)
    reports: list[list[tuple[int, int]]] = [[], []]
    open_model(config, model_info, lambda *loaded: reports[0].append(loaded)).fill()
    outline = open_outline(config, model_info, lambda *loaded: reports[1].append(loaded))
    assert outline is not None
    outline.fill()
    assert reports[0][-1] == reports[1][-1] == (model_info.weight_bytes, model_info.weight_bytes)


def test_only_the_class_reads_what_an_outline_does_not_know(tmp_path: Path) -> None:
    build_model("llama", tmp_path / "llama")
    assert outline_of(tmp_path / "llama") is not None
    assert outline_of(tmp_path / "llama", load_format="dummy") is None, "the class initializes random weights"
    assert outline_of(tmp_path / "llama", runner="pooling", convert="embed") is None
    build_model("llama", tmp_path / "longrope", rope_parameters=LONGROPE | {"original_max_position_embeddings": 64})
    assert outline_of(tmp_path / "longrope") is None, "its frequencies depend on the length of requests"
    partial = LINEAR | {"partial_rotary_factor": 0.5}
    build_model("llama", tmp_path / "partial", rope_parameters=partial, head_dim=16)
    assert outline_of(tmp_path / "partial") is None, "a part of each head does not rotate"
    build_model("olmo2", tmp_path / "olmo2")
    assert outline_of(tmp_path / "olmo2") is None


@pytest.mark.parametrize("change", ["older name", "missing", "another shape", "more"])
def test_checkpoints_that_do_not_match_exactly_are_left_to_the_class(change: str, tmp_path: Path) -> None:
    build_model("llama", tmp_path)
    tensors, name = load_file(tmp_path / WEIGHTS), "model.norm.weight"
    if change == "older name":
        tensors["norm.weight"] = tensors.pop(name)
    elif change == "missing":
        del tensors[name]
    elif change == "another shape":
        tensors[name] = tensors[name][:-1].clone()
    else:
        tensors["model.extra.weight"] = torch.zeros(2)
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    config = EngineConfig(model=str(tmp_path))
    assert open_outline(config, read_model_info(config)) is None


def test_frequencies_that_old_checkpoints_store_do_not_matter(tmp_path: Path) -> None:
    build_model("llama", tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    assert outline_of(tmp_path) is not None
