"""Tokens after the vocabulary, which prompts may have and which are never sampled (Molmo's image tokens)."""

from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError, RequestError
from engine.frontend.prompts import check_prompt
from engine.messages import Sampling
from engine.model.model_info import read_model_info
from engine.worker.prompt_logprobs import _score_part
from tests.engine.worker import mm_models_molmo
from tests.engine.worker.driver import VOCAB, Request
from tests.engine.worker.mm_driver import MMRequest, start


def test_prompts_with_them_are_sampled_and_scored(tmp_path: Path) -> None:
    """Penalties and prompt logprobs leave them out; nothing of them is sampled."""
    reference = mm_models_molmo.build(tmp_path, {})
    prompt = [5, VOCAB, 7, VOCAB + 15, 9, 11]
    driver = start(tmp_path)
    try:
        kinds = [Sampling(), Sampling(prompt_logprobs=2), Sampling(repetition_penalty=1.5), Sampling(temperature=1.0)]
        requests: list[Request] = [MMRequest(list(prompt), sampling) for sampling in kinds]
        driver.run(requests, 3, seed=0, chunk=0, preempt=0)
    finally:
        driver.executor.shutdown()
    assert requests[0].output == requests[1].output == reference.generate(torch.tensor([prompt]), 3, [])[0, 6:].tolist()
    assert all(0 <= token < VOCAB for request in requests for token in request.output)


def test_their_log_probability_is_that_of_nothing() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    ids, values, ranks = _score_part(logits, torch.tensor([1, 4]), 1)
    assert ids.tolist() == [[1, 2], [4, 0]]
    assert values[0, 0] == pytest.approx(torch.log_softmax(logits[0], -1)[1].item())
    assert values[1, 0] == -torch.inf
    assert ranks.tolist() == [2, 4]


def test_front_ends_know_them(tmp_path: Path) -> None:
    mm_models_molmo.build(tmp_path, {})
    mm = read_model_info(EngineConfig(model=str(tmp_path))).mm
    assert mm is not None
    assert mm.spec.extra_tokens == 16
    assert mm.spec.placeholders == {"image": VOCAB + 4}
    assert mm.embedding_ids == {VOCAB + 2}
    check_prompt([1, VOCAB + 15], 10, VOCAB + mm.spec.extra_tokens)
    with pytest.raises(RequestError, match=f"{VOCAB + 16} is not in the vocabulary"):
        check_prompt([1, VOCAB + 16], 10, VOCAB + mm.spec.extra_tokens)


def test_several_images_of_molmo_2_are_computed_in_one_step(tmp_path: Path) -> None:
    """Their tokens attend to each other: with a limit for a prompt, steps have room for as many."""
    mm_models_molmo.build_molmo2(tmp_path, {})
    mm = read_model_info(EngineConfig(model=str(tmp_path))).mm
    assert mm is not None
    assert mm.spec.per_prompt == {"video": 1}
    assert mm.spec.alone == "video"
    most = mm.spec.most_tokens
    assert mm.unsplit_tokens == max(most.values())
    none = read_model_info(EngineConfig(model=str(tmp_path), limit_mm_per_prompt="image=0")).mm
    assert none is not None
    assert none.spec.per_prompt == {"image": 0, "video": 1}
    assert none.unsplit_tokens == most["video"]
    two = read_model_info(EngineConfig(model=str(tmp_path), limit_mm_per_prompt="image=2,video=0")).mm
    assert two is not None
    assert two.spec.per_prompt == {"image": 2, "video": 0}
    assert two.unsplit_tokens == 2 * most["image"]
    with pytest.raises(ConfigError, match="video=2: this model takes one video per prompt"):
        read_model_info(EngineConfig(model=str(tmp_path), limit_mm_per_prompt="video=2"))
