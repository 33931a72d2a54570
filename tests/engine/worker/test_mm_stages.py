"""Pipeline stages of multimodal models: the first one encodes, and the tokens are those of plain transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kernels.cpu import build
from engine.model.loading.open_model import open_model
from engine.model.model_info import read_model_info
from engine.model.sharding.pipeline_plan import plan_pipeline
from engine.model.sharding.stage_model import connect_stage, keep_layers
from engine.worker.mm_slots import LaterStageSlots, MMSlots
from tests.engine.worker import mm_models_vision
from tests.engine.worker.mm_driver import MMDriver, Prompts, start
from tests.engine.worker.mm_model import widened
from tests.engine.worker.mm_models import MM_MODELS
from tests.engine.worker.mm_parity import CACHED, CHUNKED, FUSED_BLOCK, PREEMPTED, MMReference, compare, serve
from tests.engine.worker.stage_threads import staged_mm_driver

MakeStaged = Callable[..., MMDriver]


@pytest.fixture
def make_staged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MakeStaged:
    """Start stages on a folder and wrap them into a driver."""

    def make(folder: Path, stages: int, **options: Any) -> MMDriver:
        driver = staged_mm_driver(folder, tmp_path_factory.mktemp("store") / "store", stages, **options)
        request.addfinalizer(driver.executor.shutdown)
        return driver

    return make


def deepen_qwen3(monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    """Give Qwen3-VL layers behind the two with features of images."""
    changed = {**mm_models_vision.CONFIGS["qwen3_vl"]}
    changed["text_config"] = {**changed["text_config"], "num_hidden_layers": layers}
    monkeypatch.setitem(mm_models_vision.CONFIGS, "qwen3_vl", changed)


@pytest.fixture
def deep_qwen3(monkeypatch: pytest.MonkeyPatch) -> None:
    deepen_qwen3(monkeypatch, 3)


def check(kind: str, case: str, folder: Path, driver: MMDriver, reference: MMReference) -> None:
    row = compare(kind, case, serve(driver, Prompts(folder, MM_MODELS[kind]), case), reference)
    assert row.passed, row


@pytest.mark.usefixtures("deep_qwen3")
@pytest.mark.parametrize(
    ("kind", "cases"),
    [
        ("llava", (CHUNKED, CACHED, PREEMPTED)),
        ("qwen2_vl", (CHUNKED,)),  # rotary positions of three axes
        ("qwen3_vl", (CHUNKED, PREEMPTED)),  # features that are added to the output of layers
        ("gemma3/crops", (PREEMPTED,)),  # tokens that attend to each other, layers of two kinds
        ("molmo", (CHUNKED,)),  # embeddings that are added to those of tokens
        ("molmo2", (PREEMPTED,)),  # inputs that attend to each other, and a list of kinds of layers
        ("qwen2_audio", (CHUNKED,)),
    ],
)
def test_a_family_equals_transformers(
    kind: str, cases: tuple[str, ...], tmp_path: Path, make_staged: MakeStaged
) -> None:
    entry = MM_MODELS[kind]
    reference = MMReference(entry.build(tmp_path), entry)
    driver = make_staged(tmp_path, 2)
    first, last = driver.executor.executors
    assert isinstance(first._runner._slots, MMSlots)
    assert isinstance(last._runner._slots, LaterStageSlots)
    for case in cases:
        check(kind, case, tmp_path, driver, reference)
    assert first._runner._slots.encoder_cache.num_encoded == driver.encoded


@pytest.mark.usefixtures("deep_qwen3")
@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_the_fused_stack_equals_transformers(kind: str, tmp_path: Path, make_staged: MakeStaged) -> None:
    isas = build.supported_isas()
    if not isas:
        pytest.skip("the C++ kernels need AVX2 or NEON")
    entry = MM_MODELS[kind]
    reference = MMReference(widened(entry.build(tmp_path), tmp_path), entry)
    driver = make_staged(tmp_path, 2, block_size=FUSED_BLOCK, kernels=isas[0])
    assert driver.executor.kernels == f"{isas[0]}, fused stack"
    for case in (CHUNKED, PREEMPTED):
        check(kind, case, tmp_path, driver, reference)


def test_a_stage_between_others(tmp_path: Path, make_staged: MakeStaged, monkeypatch: pytest.MonkeyPatch) -> None:
    """It neither encodes nor reports, and needs the rotary positions all the same."""
    deepen_qwen3(monkeypatch, 4)
    entry = MM_MODELS["qwen3_vl"]
    reference = MMReference(entry.build(tmp_path), entry)
    driver = make_staged(tmp_path, 3)
    for case in (CHUNKED, PREEMPTED):
        check("qwen3_vl", case, tmp_path, driver, reference)


def test_ranks_within_stages_in_processes(tmp_path: Path) -> None:
    entry = MM_MODELS["llava"]
    reference = MMReference(entry.build(tmp_path), entry)
    driver = start(tmp_path, 2, pipeline_parallel_size=2)
    try:
        check("llava", CHUNKED, tmp_path, driver, reference)
    finally:
        driver.executor.shutdown()


def test_later_stages_have_no_tower(tmp_path: Path) -> None:
    MM_MODELS["llava"].build(tmp_path)
    config = EngineConfig(model=str(tmp_path), pipeline_parallel_size=2)
    info = read_model_info(config)
    for stage in plan_pipeline(config, info).stages:
        meta_model = open_model(config, info)
        keep_layers(meta_model, stage)
        connect_stage(meta_model, stage)
        kinds = {type(module) for module in meta_model.model.modules()}
        assert (torch.nn.Conv2d in kinds) == stage.is_first, "the tower begins with a convolution"
        meta_model.fill()
        assert not any(one.is_meta for one in meta_model.model.parameters())
        meta_model.close()


def test_towers_count_for_the_first_stage(tmp_path: Path) -> None:
    MM_MODELS["llava"].build(tmp_path)
    config = EngineConfig(model=str(tmp_path), pipeline_parallel_size=2)
    info = read_model_info(config)
    assert info.mm is not None
    plan = plan_pipeline(config, info)
    first, last = (plan.rank_info(number, info).weight_bytes for number in range(2))
    tower = info.mm.encoder_parameters * 4
    assert first > tower
    assert last < info.weight_bytes - tower
    assert first + last == pytest.approx(info.weight_bytes + 32 * 4, abs=2), "the final norm is in both"


@pytest.mark.usefixtures("deep_qwen3")
def test_layers_with_features_of_images_are_in_the_first_stage(tmp_path: Path) -> None:
    MM_MODELS["qwen3_vl"].build(tmp_path)
    config = EngineConfig(model=str(tmp_path), pipeline_parallel_size=2)
    plan = plan_pipeline(config, read_model_info(config))
    assert [(stage.begin, stage.end) for stage in plan.stages] == [(0, 2), (2, 3)]
    three = EngineConfig(model=str(tmp_path), pipeline_parallel_size=3)
    with pytest.raises(ConfigError, match=r"the first one the 2 to which features of images are added.*use --pp 2 or"):
        plan_pipeline(three, read_model_info(three))
