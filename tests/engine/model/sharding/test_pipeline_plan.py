"""How layers are divided over pipeline stages."""

import json
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.model.model_info import read_model_info
from engine.model.sharding.pipeline_plan import divide, plan_pipeline
from engine.model.stage import Stage
from tests.engine.worker.driver import BASE

sizes = st.lists(st.integers(1, 9).map(float), min_size=1, max_size=9)


def largest(layers: list[float], ends: tuple[int, ...], first: float, last: float) -> float:
    runs = [sum(layers[begin:end]) for begin, end in pairwise((0, *ends))]
    runs[0] += first
    runs[-1] += last
    return max(runs)


@given(sizes, st.data(), st.integers(0, 20).map(float), st.integers(0, 20).map(float))
def test_the_largest_stage_is_as_small_as_possible(
    layers: list[float], data: st.DataObject, first: float, last: float
) -> None:
    count = data.draw(st.integers(1, len(layers)))
    ends = divide(layers, count, first, last)
    assert len(ends) == count
    assert ends[-1] == len(layers)
    assert all(begin < end for begin, end in pairwise((0, *ends))), "each stage has a layer"
    others = [(*inner, len(layers)) for inner in combinations(range(1, len(layers)), count - 1)]
    assert largest(layers, ends, first, last) == min(largest(layers, one, first, last) for one in others)


def plan(folder: Path, stages: int, **fields: object) -> tuple[Stage, ...]:
    (folder / "config.json").write_text(json.dumps({**BASE, "model_type": "llama", **fields}))
    config = EngineConfig(model=str(folder), load_format="dummy", pipeline_parallel_size=stages)
    found = plan_pipeline(config, read_model_info(config))
    assert len(found.shares) == stages
    return found.stages


def test_a_head_counts_as_layers(tmp_path: Path) -> None:
    """With a large vocabulary the last stage has fewer layers, and so has the first one."""
    even = plan(tmp_path, 3, num_hidden_layers=9, vocab_size=8)
    assert [(one.begin, one.end) for one in even] == [(0, 3), (3, 6), (6, 9)]
    odd = plan(tmp_path, 3, num_hidden_layers=9, vocab_size=600)
    assert [len(one.layers) for one in odd] == [2, 5, 2]


@pytest.mark.parametrize("tied", [False, True])
def test_the_stages_hold_the_model_once(tied: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "model_type": "llama", "tie_word_embeddings": tied}))
    config = EngineConfig(model=str(tmp_path), load_format="dummy", pipeline_parallel_size=2)
    info = read_model_info(config)
    found = plan_pipeline(config, info)
    norm, embedding = 32 * 4, 128 * 32 * 4  # float32; the final norm is in both stages
    held = sum(found.rank_info(number, info).weight_bytes for number in range(2))
    assert held == pytest.approx(info.weight_bytes + norm + tied * embedding, abs=2)
    assert sum(found.rank_info(number, info).kv_bytes_per_token for number in range(2)) == info.kv_bytes_per_token
    assert [found.rank_info(number, info).layers for number in range(2)] == [one.layers for one in found.stages]


def test_more_stages_than_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--pp 4: each stage computes at least one layer.*use --pp 3 or less"):
        plan(tmp_path, 4)
