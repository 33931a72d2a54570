"""The fused stack in C++ with embeddings of multimodal inputs, against transformers' classes and against itself."""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from engine.config import EngineConfig
from engine.kernels.cpu import build
from engine.kernels.cpu.bindings import Stack
from engine.kernels.quantization import quantize
from engine.model.composed_decoder import ComposedDecoder
from engine.model.kv_groups import group_layers
from engine.model.loading.open_model import open_model
from engine.model.model_info import read_model_info
from engine.model.sharding.shard_model import shard_model
from engine.model.sharding.tp_plan import plan_tensor_parallel
from engine.worker import fused_stack
from engine.worker.fused_backend import FusedBackend
from engine.worker.fused_stack import StackFormats
from engine.worker.page_supply import PageSupply
from engine.worker.slots import StepBatch
from tests.engine.composites import COMPOSITES, VOCAB, build_composite
from tests.engine.model.sharding.thread_groups import ThreadGroup, make_groups
from tests.engine.worker.driver import build_model
from tests.engine.worker.input_case import Prompt, step_batch
from tests.engine.worker.mm_models import MM_MODELS
from tests.engine.worker.mm_parity import FUSED, fused_rows

ISAS = build.supported_isas()
pytestmark = pytest.mark.skipif(not ISAS, reason="the CPU kernels need AVX2 or NEON")

BLOCK, BLOCKS, THREADS = 16, 64, 2
LAYERS = 3
MROPE = {"qwen2_vl": 0, "qwen2_5_vl": 0, "qwen3_vl": 2}  # and the layers with deepstack features


def prompt_of(kind: str, tokens: int, dtype: torch.dtype, seed: int) -> Prompt:
    return Prompt.draw(tokens, 64, dtype, seed, mrope=kind in MROPE, deepstack=MROPE.get(kind, 0))


def make_backend(model: Any, form: StackFormats, isa: str, **options: Any) -> FusedBackend:
    """A backend of a model, or of a rank's shard; `options` of `make_spec`."""
    shard, adds_inputs = options.pop("shard", None), options.pop("adds_inputs", False)
    groups = group_layers([0] * LAYERS)
    partial, first = shard is not None, shard.first if shard is not None else 0
    spec, owners = fused_stack.make_spec(
        model, form, BLOCKS, BLOCK, groups, partial=partial, first_token=first, **options
    )
    stack = Stack(spec, form.weights, form.cache, THREADS, isa, owners)
    region = spec.layer[0].values - spec.layer[0].keys
    pages = PageSupply(owners, spec.layer[0].keys, 2 * LAYERS, region, region // BLOCKS)
    return FusedBackend(stack, spec, model, shard, pages, adds_inputs=adds_inputs)


def logits_of(backend: FusedBackend, batch: StepBatch) -> NDArray[np.float32]:
    backend.forward(batch)
    return backend.logits(np.arange(len(batch.logits_at))).numpy()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", COMPOSITES)
def test_float32_is_what_transformers_computes(kind: str, isa: str) -> None:
    prompt = prompt_of(kind, 53, torch.float32, 3)
    expected = prompt.expected(build_composite(kind))
    backend = make_backend(ComposedDecoder(build_composite(kind)), StackFormats("float32", "float32", "float32"), isa)
    blocks = [5, 2, 9, 1]
    found = logits_of(backend, step_batch([(prompt, 0, 53, blocks)], every=True))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())
    for changed in mutations(prompt):
        wrong = logits_of(backend, step_batch([(changed, 0, 53, blocks)], every=True))
        assert np.abs(wrong - expected).max() > 0.01 * np.abs(expected).max()


def mutations(prompt: Prompt) -> Iterator[Prompt]:
    """What must give other logits."""
    yield replace(prompt, embeddings=prompt.embeddings.flip(0))
    yield replace(prompt, at=np.minimum(prompt.at + 1, len(prompt.ids) - 1))
    if prompt.rotary is not None:
        yield replace(prompt, rotary=prompt.rotary[[0, 2, 1]])
        yield replace(prompt, rotary=np.tile(np.arange(len(prompt.ids)), (3, 1)))
    if prompt.deepstack is not None:
        yield replace(prompt, deepstack=prompt.deepstack.flip(0))


FORMS = {
    "float32": StackFormats("float32", "float32", "float32"),
    "bfloat16": StackFormats("bfloat16", "bfloat16", "bfloat16"),
    "int8": StackFormats("bfloat16", "int8", "int8"),
    "int4": StackFormats("bfloat16", "int4", "bfloat16"),
}


@functools.cache
def long_lived(isa: str, form: str) -> FusedBackend:
    dtype = getattr(torch, FORMS[form].dtype)
    model = ComposedDecoder(build_composite("qwen3_vl", dtype, intermediate_size=64))
    return make_backend(model, FORMS[form], isa)


@pytest.mark.parametrize(("form", "most"), [("bfloat16", 0.03), ("int8", 0.05), ("int4", 0.09)])
@pytest.mark.parametrize("isa", ISAS)
def test_other_formats_compute_what_their_weights_say(isa: str, form: str, most: float) -> None:
    """Against transformers in float32 with the rounded weights: what is left is the rounding of activations."""
    model = build_composite("qwen3_vl", torch.bfloat16, intermediate_size=64).float()
    if form != "bfloat16":
        for name, linear in model.named_modules():
            if isinstance(linear, torch.nn.Linear):
                kind = "int8" if name == "lm_head" else form
                if linear.weight.shape[1] == 64:  # the decoder's
                    linear.weight.copy_(quantize(linear.weight, kind).dequantize())
    prompt = prompt_of("qwen3_vl", 60, torch.bfloat16, 5)
    expected = prompt.expected(model)
    found = logits_of(long_lived(isa, form), step_batch([(prompt, 0, 60, [1, 2, 3, 4])], every=True))
    assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < most


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=8, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 149), max_size=5, unique=True).map(sorted),
    others=st.lists(st.integers(1, 60), max_size=3),
    place=st.integers(0, 3),
)
def test_the_same_bits_alone_in_a_batch_and_in_chunks(
    isa: str, form: str, cuts: list[int], others: list[int], place: int
) -> None:
    backend, dtype = long_lived(isa, form), getattr(torch, FORMS[form].dtype)
    prompt = prompt_of("qwen3_vl", 150, dtype, 6)
    alone = logits_of(backend, step_batch([(prompt, 0, 150, list(range(1, 11)))]))[0]
    rows = [
        (prompt_of("qwen3_vl", n, dtype, 7 + i), 0, n, list(range(30 + 4 * i, 34 + 4 * i)))
        for i, n in enumerate(others)
    ]
    at, found = min(place, len(others)), alone
    for begin, end in zip([0, *cuts], [*cuts, 150], strict=True):
        chunk = (prompt, begin, end, list(range(15, 25)))
        found = logits_of(backend, step_batch([*rows[:at], chunk, *rows[at:]]))[at]
    assert (found == alone).all()


def test_embeddings_that_are_added_and_tokens_without_logits() -> None:
    """As Molmo has them: images are added to the embeddings of tokens that are never sampled."""
    more = 16
    model = build_composite("llava")
    table = torch.randn(VOCAB + more, 64)
    model.model.language_model.embed_tokens = torch.nn.Embedding.from_pretrained(table)
    prompt = Prompt.draw(40, 64, torch.float32, 9)
    prompt.ids[prompt.at] = VOCAB + prompt.at % more
    embedded = table[prompt.ids].index_add(0, torch.from_numpy(prompt.at), prompt.embeddings)
    decoder = ComposedDecoder(model)
    with torch.inference_mode():
        expected = decoder(inputs_embeds=embedded[None], logits_to_keep=torch.arange(40)).logits[0].numpy()
    backend = make_backend(decoder, FORMS["float32"], ISAS[0], adds_inputs=True)
    found = logits_of(backend, step_batch([(prompt, 0, 40, [1, 2, 3])], every=True))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


def test_missing_rotary_positions_are_an_error() -> None:
    backend = long_lived(ISAS[0], "float32")
    text = Prompt.draw(5, 64, torch.float32, 1, deepstack=2)
    with pytest.raises(ValueError, match="3 rotary positions each"):
        backend.forward(step_batch([(text, 0, 5, [1])]))


class InPlaceGroup(ThreadGroup):
    """Overwrites what it sums, as groups of processes do."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(super().all_reduce(tensor))


def test_embeddings_count_once_for_all_ranks(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path, hidden_size=64, intermediate_size=96, head_dim=16, rope_parameters=None)
    prompt = Prompt.draw(45, 64, torch.float32, 8, deepstack=2)
    whole = make_backend(model, FORMS["float32"], ISAS[0])
    chunks = [(prompt, 0, 20, [1, 2, 3]), (prompt, 20, 45, [1, 2, 3])]
    expected = np.concatenate([logits_of(whole, step_batch([one], every=True)) for one in chunks])
    config = EngineConfig(model=str(tmp_path), tensor_parallel_size=2)
    tp_plan = plan_tensor_parallel(config, read_model_info(config))
    parts = [open_model(config, read_model_info(config)) for _ in range(2)]
    groups = [InPlaceGroup(one.rank, one.size, one._slots, one._barrier) for one in make_groups(2)]

    def run(rank: int) -> NDArray[np.float32]:
        meta_model = parts[rank]
        shard_model(meta_model, tp_plan, groups[rank])
        backend = make_backend(
            meta_model.model, FORMS["float32"], ISAS[0], shard=meta_model.vocab_shard, fill=meta_model.fill
        )
        return np.concatenate([logits_of(backend, step_batch([one], every=True)) for one in chunks])

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, range(2)))
    assert (found[0] == found[1]).all(), "ranks disagree"
    np.testing.assert_allclose(found[0], expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["llava"])
def test_requests_with_inputs_equal_transformers(kind: str, tmp_path: Path) -> None:
    """Through the worker, with the model's encoder; `make parity` covers the other families, and two ranks."""
    rows = list(fused_rows(kind, MM_MODELS[kind], tmp_path, ranks=(1,)))
    assert [row.case for row in rows] == [FUSED]
    assert rows[0].passed, rows[0]
    assert not rows[0].note
