"""What --pp does not work with is refused by the name of the flag."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.memory import resolve
from engine.model.model_info import read_model_info
from engine.pipeline_options import check_stages_on
from tests.engine.worker.driver import BASE


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "v0"}, "--pp 2 does not work with --engine v0: "),
        ({"ablate": ("full-state",)}, "--pp 2 does not work with --ablate full-state: "),
        ({"ablate": ("driver-broadcast",), "tensor_parallel_size": 2}, "--ablate driver-broadcast: "),
        ({"device": "sim:h100"}, "--pp 2 does not work with --device sim:h100: "),
        ({"pipeline_parallel_size": 0}, "--pp must be at least 1"),
    ],
)
def test_options_are_refused_by_name(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EngineConfig(**{"model": "m", "pipeline_parallel_size": 2, **options})


def test_one_stage_refuses_nothing() -> None:
    assert EngineConfig(model="m", speculative="ngram", ablate=("inline-frontend",)).num_ranks == 1


def test_gpus_are_refused() -> None:
    config = EngineConfig(model="m", pipeline_parallel_size=2)
    with pytest.raises(ConfigError, match="--pp 2 works on the CPU only: use --tp"):
        check_stages_on(config, "cuda")
    check_stages_on(config, "")
    check_stages_on(EngineConfig(model="m"), "cuda")


def test_encoders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "model_type": "bert"}))
    config = EngineConfig(model=str(tmp_path), load_format="dummy", pipeline_parallel_size=2)
    with pytest.raises(ConfigError, match=r"--pp does not work with models that .* are encoders: leave it out"):
        read_model_info(config)


def test_ranks_are_numbered_stage_by_stage(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "model_type": "llama"}))
    config = EngineConfig(
        model=str(tmp_path), load_format="dummy", tensor_parallel_size=2, pipeline_parallel_size=3,
        data_parallel_size=2, replica=1,
    )  # fmt: skip
    assert (config.num_ranks, config.total_ranks, config.first_rank, config.answering_rank) == (6, 12, 6, 4)
    resolved = resolve(config, read_model_info(config)).config
    assert resolved.pipeline_stages == 3
    assert resolved.most_steps_in_flight == 4
