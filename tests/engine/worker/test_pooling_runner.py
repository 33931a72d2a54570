"""Vectors of prompts through a core and its worker, compared with transformers' hidden states."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.arrays import Float32s
from engine.config import EngineConfig
from engine.model.model_info import read_model_info
from engine.model.sharding.pipeline_plan import plan_pipeline
from tests.engine.pooling_models import (
    DECODERS,
    ENCODERS,
    POSITIONS,
    VOCABULARY,
    PoolingEngine,
    build,
    hidden_states,
    pooled,
    pooling_engine,
    write_sentence_transformers,
)

TOLERANCE = 2e-5  # float32, summed in another order; the values are about 1


def draw_prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, VOCABULARY) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def assert_close(found: list[Float32s], expected: list[Float32s]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_match_transformers(kind: str, tmp_path: Path) -> None:
    model = build(kind, tmp_path)
    write_sentence_transformers(tmp_path, "mean_tokens")
    with pooling_engine(tmp_path) as engine:
        longest = engine.model_info.max_model_len
        assert longest == (POSITIONS - 2 if kind in ("camembert", "mpnet", "roberta", "xlm-roberta") else POSITIONS)
        prompts = [*draw_prompts(5, longest), [7] * longest]
        assert_close(engine.pool(prompts), [pooled(hidden_states(model, one), "mean") for one in prompts])


def test_an_encoder_has_neither_kv_cache_nor_prefix_cache(tmp_path: Path) -> None:
    build("bert", tmp_path)
    with pooling_engine(tmp_path) as engine:
        assert engine.resolved.kv_windows == ()
        assert engine.resolved.num_blocks == 1
        assert not engine.resolved.enable_prefix_caching
        prompt = [5] * POSITIONS
        first, second = engine.pool([prompt]), engine.pool([prompt])
        assert np.array_equal(first[0], second[0])
        assert set(engine.cached.values()) == {0}


@pytest.mark.parametrize("mode", ["mean_tokens", "cls_token", "lasttoken"])
@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_match_transformers(kind: str, mode: str, tmp_path: Path) -> None:
    model = build(kind, tmp_path)
    write_sentence_transformers(tmp_path, mode)
    with pooling_engine(tmp_path) as engine:
        prompts = [*draw_prompts(9, 40), [7] * POSITIONS]
        method = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last"}[mode]
        assert_close(engine.pool(prompts), [pooled(hidden_states(model, one), method) for one in prompts])


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_causal_language_model_embeds_by_its_last_token(kernels: str, tmp_path: Path) -> None:
    """In chunks, after prefix hits, and with the KV cache of only two prompts."""
    model = build("qwen3", tmp_path, "AutoModelForCausalLM", tie_word_embeddings=False)
    options: dict[str, Any] = {"runner": "pooling", "kernels": kernels, "max_num_batched_tokens": 24}
    with pooling_engine(tmp_path, **options) as engine:
        assert engine.resolved.enable_prefix_caching
        prefix = draw_prompts(1, 1, seed=3)[0] * 33
        prompts = [prefix + one for one in draw_prompts(12, 30, seed=1)]
        expected = [pooled(hidden_states(model.model, one), "last") for one in prompts]
        assert_close(engine.pool(prompts), expected)
        assert_close(engine.pool(prompts), expected)
        assert max(engine.cached.values()) >= 32
        assert engine.core.scheduler.counters.steps > 12


@pytest.mark.parametrize(
    ("kind", "mode", "kernels", "stages"),
    [
        ("qwen3", "lasttoken", "auto", 3),
        ("qwen3", "mean_tokens", "auto", 2),
        ("llama", "lasttoken", "torch", 2),
        ("gpt2", "cls_token", "auto", 3),
    ],
)
def test_the_last_pipeline_stage_pools(kind: str, mode: str, kernels: str, stages: int, tmp_path: Path) -> None:
    """In chunks that follow each other through the stages, and after prefix hits."""
    model = build(kind, tmp_path)
    write_sentence_transformers(tmp_path, mode)
    method = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last"}[mode]
    options: dict[str, Any] = {"max_num_batched_tokens": 24} if method == "last" else {}
    with pooling_engine(tmp_path, pipeline_parallel_size=stages, kernels=kernels, **options) as engine:
        prefix = draw_prompts(1, 1, seed=3)[0] * 33
        prompts = [prefix + one for one in draw_prompts(8, 30, seed=1)]
        expected = [pooled(hidden_states(model, one), method) for one in prompts]
        assert_close(engine.pool(prompts), expected)
        assert_close(engine.pool(prompts), expected)
        assert (max(engine.cached.values()) >= 32) == (method == "last")


def test_no_pipeline_stage_has_the_head_of_a_model_that_pools(tmp_path: Path) -> None:
    build("qwen3", tmp_path)
    config = EngineConfig(model=str(tmp_path), dtype="float32", pipeline_parallel_size=2)
    info = read_model_info(config)
    plan = plan_pipeline(config, info)
    assert [stage.has_head for stage in plan.stages] == [False, False]
    held = sum(plan.rank_info(number, info).weight_bytes for number in range(2))
    assert held == pytest.approx(info.weight_bytes + 32 * 4, abs=2), "the final norm is in both"


def test_a_score_is_computed_by_the_last_stage(tmp_path: Path) -> None:
    build("qwen3", tmp_path, "AutoModelForSequenceClassification", num_labels=1)
    prompts = draw_prompts(5, 40)
    with pooling_engine(tmp_path) as engine:
        expected = engine.pool(prompts)
    with pooling_engine(tmp_path, pipeline_parallel_size=2) as engine:
        assert_close(engine.pool(prompts), expected)
    assert len({float(one[0]) for one in expected}) == len(prompts)


def test_quantized_weights_pool_too(tmp_path: Path) -> None:
    model = build("qwen3", tmp_path, "AutoModelForCausalLM", hidden_size=64, intermediate_size=128)
    with pooling_engine(tmp_path, convert="embed", dtype="bfloat16", quantization="int8") as engine:
        prompts = draw_prompts(4, 30)
        for found, prompt in zip(engine.pool(prompts), prompts, strict=True):
            expected = pooled(hidden_states(model.model, prompt), "last")
            cosine = found @ expected / np.linalg.norm(found) / np.linalg.norm(expected)
            assert cosine > 0.995


# ---------------------------------------------------------------------------------------------------------- properties


@pytest.fixture(scope="module", params=["bert", "llama", "qwen3"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolingEngine]:
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param, folder)
    with pooling_engine(folder, max_num_batched_tokens=96) as running:
        yield running


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 14))
def test_neighbors_and_order_change_no_vector(engine: PoolingEngine, seed: int, count: int) -> None:
    prompts = draw_prompts(count, POSITIONS, seed)
    alone = [engine.pool([one])[0] for one in prompts]
    order = list(range(count))
    random.Random(seed).shuffle(order)
    together = engine.pool([prompts[number] for number in order])
    for number, found in zip(order, together, strict=True):
        np.testing.assert_allclose(found, alone[number], rtol=0, atol=1e-5)


def test_prompts_of_wrong_lengths_are_refused_alone(engine: PoolingEngine) -> None:
    with pytest.raises(AssertionError, match=f"the prompt has {POSITIONS + 1} tokens; 1 to {POSITIONS} can be served"):
        engine.pool([[3] * (POSITIONS + 1), [3, 4]])
    with pytest.raises(AssertionError, match="the prompt has 0 tokens"):
        engine.pool([[]])
    assert len(engine.pool([[3, 4]])) == 1
