"""Every family through the worker equals plain transformers, whatever the schedule; and mistakes are seen."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.kernels.cpu import build
from engine.model.families import FAMILIES
from tests.engine.worker import parity
from tests.engine.worker.driver import MODELS, Driver, Request, build_model
from tests.engine.worker.parity import CASES, NEW, Reference, compare, prompts, serve

MakeDriver = Callable[..., Driver]
WHOLE = {"llama", "gpt2", "gemma2", "deepseek_v3", "qwen3_moe"}  # families that are also served one request at a time


def cases_of(kind: str) -> tuple[str, ...]:
    """`make parity` serves all families in all ways."""
    return CASES if kind in WHOLE else tuple(case for case in CASES if case != "alone")


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_every_family_equals_transformers(kind: str, tmp_path: Path, make_driver: MakeDriver) -> None:
    reference = Reference(build_model(kind, tmp_path))
    driver = make_driver(tmp_path, kernels="torch")
    for case in cases_of(kind):
        row = compare(kind, case, serve(driver, case), reference)
        assert row.passed, row


@pytest.mark.parametrize(
    ("kind", "mistake"),
    [
        ("llama", parity.positions_off_by_one),
        ("gpt2", parity.positions_off_by_one),
        ("llama", parity.a_block_zeroed),
        ("qwen3_moe", parity.a_block_zeroed),
    ],
)
def test_mistakes_are_seen(kind: str, mistake: Callable[..., object], tmp_path: Path, make_driver: MakeDriver) -> None:
    reference = Reference(build_model(kind, tmp_path))
    driver = make_driver(tmp_path, kernels="torch")
    with mistake(driver):  # type: ignore[attr-defined]
        row = compare(kind, "chunked", serve(driver, "chunked"), reference)
    assert not row.passed
    row = compare(kind, "chunked", serve(driver, "chunked"), reference)
    assert row.passed, row


@pytest.mark.parametrize("kind", sorted(kind for kind, more in MODELS.items() if "sliding_window" in more))
def test_a_window_off_by_one_is_seen(kind: str, tmp_path: Path, make_driver: MakeDriver) -> None:
    reference = Reference(build_model(kind, tmp_path))
    driver = make_driver(tmp_path, kernels="torch")
    with parity.windows_off_by_one():
        assert not compare(kind, "chunked", serve(driver, "chunked"), reference).passed


@pytest.mark.parametrize("limit", [32, 256])
def test_a_longrope_is_pinned_by_the_length_of_requests(limit: int, tmp_path: Path, make_driver: MakeDriver) -> None:
    """Beyond the original length transformers takes the long factors, below it the short ones."""
    factors = {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 3.0, 7.0, 9.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, **factors}
    model = build_model("phi3", tmp_path, rope_parameters=rope, original_max_position_embeddings=32)
    reference, driver = Reference(model), make_driver(tmp_path, max_model_len=limit)
    long = limit > 32
    requests = [Request(prompt) for prompt in prompts(1) if (len(prompt) > 32 if long else len(prompt) + NEW <= 32)]
    assert requests
    driver.run(requests, NEW, seed=3)
    for request in requests:
        assert request.output == reference.run(request.prompt)[0]


@pytest.mark.parametrize("isa", build.supported_isas())
@pytest.mark.parametrize("kind", sorted(kind for kind, family in FAMILIES.items() if family.fused))
def test_the_fused_stack_equals_transformers(kind: str, isa: str, tmp_path: Path, make_driver: MakeDriver) -> None:
    reference = Reference(build_model(kind, tmp_path, head_dim=16))
    driver = make_driver(tmp_path, block_size=16, kernels=isa)
    assert driver.executor.kernels == f"{isa}, fused stack"
    for case in cases_of(kind):
        row = compare(kind, case, serve(driver, case), reference)
        assert row.passed, row
    plain = [Request(prompt) for prompt in prompts(1)]  # whose tokens are chosen without their logits
    driver.run(plain, NEW, seed=3)
    assert [request.output for request in plain] == [reference.run(request.prompt)[0] for request in plain]


def test_a_model_that_shows_nothing_does_not_pass(tmp_path: Path, make_driver: MakeDriver) -> None:
    model = build_model("llama", tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path)
    driver = make_driver(tmp_path, kernels="torch")
    row = compare("llama", "alone", serve(driver, "alone"), Reference(model))
    assert not row.passed
    assert "proves nothing" in row.note


def test_the_suite_holds_every_family() -> None:
    assert set(MODELS) == set(FAMILIES)
