"""Shards of a model, run as threads of one process, compute what the whole model computes."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.errors import ConfigError, ModelError
from engine.kernels.attention import Ragged, Workspace
from engine.model.families import FAMILIES
from engine.model.loading.meta_model import MetaModel
from engine.model.loading.open_model import fill_and_check, kv_layout, open_model
from engine.model.model_info import ModelInfo, read_model_info
from engine.model.runtime import attention_interface
from engine.model.runtime.attention_interface import ForwardContext, KVCache
from engine.model.sharding.shard_model import shard_model
from engine.model.sharding.tp_plan import plan_tensor_parallel
from tests.engine.model.sharding.thread_groups import ThreadGroup, make_groups
from tests.engine.worker.driver import BASE, MODELS, MOE, VOCAB, build_model

# By the plan of its class; no family of ours is.
UNDIVIDED = "flex_olmo"
TOKENS = 23
BLOCK = 4
TOLERANCE = 1e-4


@torch.inference_mode()
def logits_of(model: Any, model_info: ModelInfo, ids: list[int]) -> Tensor:
    """Logits [tokens, vocabulary] of a prompt computed in two chunks."""
    layout = kv_layout(model_info, BLOCK)
    blocks, groups = -(-len(ids) // BLOCK), len(model_info.kv_groups.windows)
    cache, workspace = KVCache(model_info.kv_groups, groups * blocks + 1, layout), Workspace(layout.dtype)
    tables = np.arange(1, groups * blocks + 1, dtype=np.int32).reshape(groups, 1, blocks)
    parts = []
    for first, last in ((0, len(ids) // 2), (len(ids) // 2, len(ids))):
        positions = np.arange(first, last)
        ragged = Ragged(np.zeros(1, np.int64), np.array([last - first]), np.array([first]), tables)
        forward = ForwardContext.build(cache, ragged, np.zeros(last - first, dtype=np.int64), positions, workspace)
        arguments = {
            "input_ids": torch.tensor([ids[first:last]]),
            "position_ids": torch.from_numpy(positions)[None],
            "use_cache": False,
        }
        parts.append(attention_interface.run_model(model, forward, arguments).logits[0])
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *((kind, 2) for kind in (*sorted(FAMILIES), UNDIVIDED)),
        ("glm4", 4),
        ("qwen3_moe", 4),
        ("deepseek_v3", 4),
        ("olmo2", 4),
    ],
)
def test_the_shares_give_the_logits_of_the_whole(kind: str, size: int, tmp_path: Path, monkeypatch: Any) -> None:
    if size == 4:
        wider = {"num_key_value_heads": 4, "moe_intermediate_size": 32}
        monkeypatch.setitem(MODELS, kind, {**MODELS[kind], **wider})
    if kind == UNDIVIDED:
        monkeypatch.setitem(MODELS, kind, MOE)
    build_model(kind, tmp_path)
    config = EngineConfig(model=str(tmp_path), tensor_parallel_size=size)
    model_info = read_model_info(config)
    tp_plan = plan_tensor_parallel(config, model_info)
    torch.manual_seed(1)
    ids = torch.randint(VOCAB, (TOKENS,)).tolist()
    model = fill_and_check(open_model(config, model_info), config, model_info)
    whole = logits_of(model, model_info, ids)

    groups, blanks = make_groups(size), [open_model(config, model_info) for _ in range(size)]

    def run(meta_model: MetaModel, group: ThreadGroup) -> tuple[Any, Tensor]:
        shard_model(meta_model, tp_plan, group)
        share = fill_and_check(meta_model, config, tp_plan.rank_info)
        assert meta_model.vocab_shard is not None
        return share, meta_model.vocab_shard.gather(logits_of(share, tp_plan.rank_info, ids))

    with ThreadPoolExecutor(size) as pool:
        models, shares = zip(*pool.map(run, blanks, groups), strict=True)
    assert all(torch.equal(share, shares[0]) for share in shares[1:])
    assert float((shares[0] - whole).abs().max()) < TOLERANCE
    ids[TOKENS // 2] += 1 if ids[TOKENS // 2] == 0 else -1
    assert float((logits_of(model, model_info, ids) - whole)[-1].abs().max()) > 100 * TOLERANCE
    held = [{id(value): value.numel() for value in model.state_dict(keep_vars=True).values()} for model in models]
    stored = [4 * sum(numbers.values()) for numbers in held]  # bytes
    assert sum(stored) == tp_plan.weight_bytes
    assert max(stored) < model_info.weight_bytes
    assert tp_plan.divides_heads == (kind != UNDIVIDED)
    assert bool(tp_plan.warnings) == (kind == UNDIVIDED)
    assert (
        tp_plan.rank_info.kv_bytes_per_token * (size if tp_plan.divides_heads else 1) == model_info.kv_bytes_per_token
    )


def dummy(tmp_path: Path, kind: str, **changes: Any) -> EngineConfig:
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "model_type": kind, **MODELS.get(kind, {}), **changes}))
    return EngineConfig(model=str(tmp_path), load_format="dummy", tensor_parallel_size=2)


def test_a_class_without_a_plan_is_refused(tmp_path: Path) -> None:
    config = dummy(tmp_path, "codegen")
    with pytest.raises(ModelError, match=r"--tp 2.*no tensor-parallel plan for"):
        plan_tensor_parallel(config, read_model_info(config))


def test_heads_that_do_not_divide_are_refused_with_what_works(tmp_path: Path) -> None:
    config = dummy(tmp_path, "llama", num_attention_heads=9, num_key_value_heads=3, hidden_size=36)
    with pytest.raises(ConfigError, match=r"its 9 heads and 3 KV heads are not divisible by 2; use --tp 1 or 3$"):
        plan_tensor_parallel(config, read_model_info(config))


@pytest.mark.parametrize(
    ("kind", "changes"), [("llama", {"intermediate_size": 49}), ("mixtral", {"intermediate_size": 49})]
)
def test_weights_that_do_not_divide_are_refused_with_what_works(kind: str, changes: Any, tmp_path: Path) -> None:
    config = dummy(tmp_path, kind, **{"moe_intermediate_size": None, **changes})
    with pytest.raises(ConfigError, match=r"its weights of length 49 are not divisible by 2; use --tp 1$"):
        plan_tensor_parallel(config, read_model_info(config))


def test_a_style_that_is_not_known_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    from transformers import LlamaConfig

    monkeypatch.setattr(LlamaConfig, "base_model_tp_plan", {"layers.*.self_attn.q_proj": "mla_kv_a_proj"})
    config = dummy(tmp_path, "llama")
    with pytest.raises(ModelError, match="aren't supported: mla_kv_a_proj"):
        plan_tensor_parallel(config, read_model_info(config))


def test_the_plan_of_the_vocabulary_is_not_the_classes(tmp_path: Path, monkeypatch: Any) -> None:
    """Some releases of transformers plan it for all tied models, with a style of its own."""
    from transformers import LlamaConfig

    config = dummy(tmp_path, "llama", tie_word_embeddings=True)
    expected = plan_tensor_parallel(config, read_model_info(config)).styles
    more = {**LlamaConfig.base_model_tp_plan, "embed_tokens": "embedding_rowwise"}
    monkeypatch.setattr(LlamaConfig, "base_model_tp_plan", more)
    assert plan_tensor_parallel(config, read_model_info(config)).styles == expected
