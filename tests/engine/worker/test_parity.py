"""Greedy output through the worker equals transformers' generate(), whatever the schedule."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.kernels.cpu import build
from engine.model.families import FAMILIES
from tests.engine.worker.driver import MODELS, VOCAB, Driver, Request, build_model

NEW = 12


def reference(model: torch.nn.Module, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def prompts(seed: int) -> list[list[int]]:
    luck = random.Random(seed)
    shared = [luck.randrange(VOCAB) for _ in range(21)]
    alone = [[luck.randrange(VOCAB) for _ in range(length)] for length in (1, 3, 18, 70)]
    return [*alone, [*shared, 5, 6, 7], [*shared, 8], [*shared[:16], 1, 2], [*shared, 5, 6, 7]]


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_every_tested_kind_equals_generate(kind: str, tmp_path: Path, make_driver: Callable[..., Driver]) -> None:
    model = build_model(kind, tmp_path)
    driver = make_driver(tmp_path)
    requests = [Request(prompt) for prompt in prompts(1)]
    driver.run(requests, NEW, seed=3)
    for request in requests:
        assert request.output == reference(model, request.prompt, NEW)
    assert driver.shared > 0


@pytest.mark.parametrize("limit", [32, 256])
def test_a_longrope_is_pinned_by_the_length_of_requests(
    limit: int, tmp_path: Path, make_driver: Callable[..., Driver]
) -> None:
    """Beyond the original length transformers takes the long factors, below it the short ones."""
    factors = {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 3.0, 7.0, 9.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, **factors}
    model = build_model("phi3", tmp_path, rope_parameters=rope, original_max_position_embeddings=32)
    driver = make_driver(tmp_path, max_model_len=limit)
    requests = [Request(prompt) for prompt in prompts(1) if (len(prompt) > 32) == (limit > 32)]
    assert requests
    new = 4 if limit == 32 else NEW
    driver.run(requests, new, seed=3)
    for request in requests:
        assert request.output == reference(model, request.prompt, new)


@pytest.mark.parametrize("level", build.levels())
@pytest.mark.parametrize("kind", sorted(kind for kind, family in FAMILIES.items() if family.fused))
def test_the_fused_stack_equals_generate(
    kind: str, level: str, tmp_path: Path, make_driver: Callable[..., Driver]
) -> None:
    model = build_model(kind, tmp_path, head_dim=16)
    driver = make_driver(tmp_path, block_size=16, kernels=level)
    assert driver.executor.kernels == f"{level}, fused stack"
    requests = [Request(prompt) for prompt in prompts(1)]
    driver.run(requests, NEW, seed=3)
    for request in requests:
        assert request.output == reference(model, request.prompt, NEW)
    assert driver.shared > 0


def test_the_suite_holds_every_family() -> None:
    assert set(MODELS) == set(FAMILIES)
