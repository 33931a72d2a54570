"""Models that are built on the meta device and filled part by part."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.model.checkpoints.weight_mapping import Placement
from engine.model.loading.meta_model import MetaModel, ShardSlice
from engine.model.loading.open_model import fill_and_check, open_model
from engine.model.loading.weight_sources import _overlaps
from engine.model.model_info import read_model_info
from tests.engine.worker.driver import MODELS, Driver, build_model


def opened(folder: Path, **options: Any) -> MetaModel:
    config = EngineConfig(model=str(folder), **options)
    return open_model(config, read_model_info(config))


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_every_parameter_and_buffer_is_what_transformers_loads(kind: str, tmp_path: Path) -> None:
    model = build_model(kind, tmp_path)
    meta_model = opened(tmp_path)
    assert all(parameter.is_meta for parameter in meta_model.model.parameters())
    meta_model.fill()
    wanted, found = model.state_dict(), meta_model.model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    buffers = dict(meta_model.model.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())


def test_no_file_stays_open(tmp_path: Path, make_driver: Callable[..., Driver]) -> None:
    build_model("llama", tmp_path)
    make_driver(tmp_path)
    descriptors = Path("/proc/self/fd")
    assert str(tmp_path / "model.safetensors") not in {str(one.resolve()) for one in descriptors.iterdir()}


def test_what_is_tied_stays_one_parameter(tmp_path: Path) -> None:
    build_model("llama", tmp_path, tie_word_embeddings=True)
    model = opened(tmp_path).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    meta_model = opened(tmp_path)
    meta_model.fill(meta_model.model.lm_head)
    meta_model.fill()
    assert meta_model.model.lm_head.weight is meta_model.model.model.embed_tokens.weight


def test_shards_are_read_like_one_file(tmp_path: Path) -> None:
    model = build_model("mixtral", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    meta_model = opened(tmp_path)
    meta_model.fill()
    wanted = model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in meta_model.model.state_dict().items())


def test_a_base_models_checkpoint_loads_into_the_whole_class(tmp_path: Path) -> None:
    """GPT-2's own checkpoint has no prefix before its layers."""
    model = build_model("gpt2", tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name.removeprefix("transformer."): value for name, value in load_file(file).items()}, file)
    meta_model = opened(tmp_path)
    meta_model.fill()
    assert torch.equal(meta_model.model.transformer.h[1].mlp.c_fc.weight, model.transformer.h[1].mlp.c_fc.weight)


def change(folder: Path, alter: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    alter(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("kind", "alter", "says"),
    [
        ("llama", lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight$"),
        (
            "llama",
            lambda t: [t.pop(name) for name in list(t) if "layers.1." in name],
            r"lacks model.layers.1.\S+ and 8 more$",
        ),
        (
            "llama",
            lambda t: t.update({"model.norm.weight": torch.ones(7)}),
            r"of shape \(7,\), the model .* of \(32,\)",
        ),
        ("mixtral", lambda t: t.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"), "lacks a part of"),
        (
            "mixtral",
            lambda t: t.update({"model.layers.1.block_sparse_moe.experts.2.w3.weight": torch.ones(99, 32)}),
            "doesn't fit",
        ),
    ],
)
def test_a_checkpoint_that_lacks_something_is_refused(kind: str, alter: Any, says: str, tmp_path: Path) -> None:
    build_model(kind, tmp_path)
    change(tmp_path, alter)
    with pytest.raises(ModelError, match=says):
        opened(tmp_path)


def test_unused_tensors_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build_model("llama", tmp_path)
    change(tmp_path, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}))
    with caplog.at_level(logging.WARNING, "redline.worker"):
        opened(tmp_path)
    assert (
        "no parameters for 1 of the checkpoint's tensors, for example model.layers.0.self_attn.q_proj.bias"
        in caplog.text
    )
    caplog.clear()
    change(
        tmp_path,
        lambda t: [
            t.pop("model.layers.0.self_attn.q_proj.bias"),
            t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        ],
    )
    opened(tmp_path)
    assert not caplog.records


def test_dummy_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    build_model("qwen2", tmp_path)
    first, again = opened(tmp_path, load_format="dummy"), opened(tmp_path, load_format="dummy")
    other = opened(tmp_path, load_format="dummy", seed=1)
    for meta_model in (first, other):
        meta_model.fill()
    again.fill(again.model.model.layers[2])
    again.fill()
    same = dict(again.model.named_parameters())
    assert all(torch.equal(value, same[name]) for name, value in first.model.named_parameters())
    assert not torch.equal(first.model.lm_head.weight, other.model.lm_head.weight)
    assert torch.equal(first.model.model.norm.weight, torch.ones(32))
    assert 0.1 < float(first.model.model.layers[0].mlp.up_proj.weight.std()) < 0.2  # the config's initializer_range


def test_what_must_stay_float32_is(tmp_path: Path) -> None:
    build_model("deepseek_v3", tmp_path)
    meta_model = opened(tmp_path, dtype="bfloat16")
    meta_model.fill()
    assert meta_model.model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert meta_model.model.model.layers[1].mlp.gate.weight.dtype == torch.bfloat16


def test_the_bytes_read_are_reported(tmp_path: Path) -> None:
    build_model("llama", tmp_path, tie_word_embeddings=True)
    config = EngineConfig(model=str(tmp_path), dtype="float32")
    model_info, heard = read_model_info(config), list[tuple[int, int]]()
    fill_and_check(open_model(config, model_info, lambda *loaded: heard.append(loaded)), config, model_info)
    assert heard[-1] == (model_info.weight_bytes, model_info.weight_bytes)


cuts = st.integers(1, 4).flatmap(
    lambda ranks: st.tuples(
        st.just(ranks),
        st.integers(0, ranks - 1),
        st.lists(st.integers(1, 5).map(lambda n, ranks=ranks: n * ranks), min_size=1, max_size=3),
        st.integers(1, 5),
    )
)


@given(cuts)
def test_placements_and_shards_overlap_wherever_they_meet(case: tuple[int, int, list[int], int]) -> None:
    """A parameter made of placements of `width`, of which a rank has its slice of each of the parts."""
    ranks, rank, parts, width = case
    whole = torch.arange(sum(parts))
    ranges, begin = [], 0
    for length in parts:
        ranges.append((begin + rank * length // ranks, length // ranks))
        begin += length
    wanted = torch.cat([whole.narrow(0, *one) for one in ranges])
    found = torch.full_like(wanted, -1)
    for first in range(0, len(whole), width):
        stored = whole[first : first + width]
        for at, source, length, _ in _overlaps(Placement("p", (first,), (len(stored),)), ShardSlice(0, tuple(ranges))):
            found[at : at + length] = stored[source : source + length]
    assert torch.equal(found, wanted)
