"""A start says how far the weights are read, whichever process reads them."""

import itertools
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.model.model_info import read_model_info
from engine.start import start_engine
from tests.engine.worker.driver import build_model


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_bytes_that_were_read_are_told(ranks: int, tmp_path: Path) -> None:
    build_model("llama", tmp_path)
    config = EngineConfig(model=str(tmp_path), tensor_parallel_size=ranks, max_model_len=64, max_num_seqs=2)
    heard: list[tuple[int, int]] = []
    engine = start_engine(config, loading=lambda done, total: heard.append((done, total)))
    engine.stop()
    total = read_model_info(config).weight_bytes
    assert heard[-1] == (total, total)
    assert all(before[0] < after[0] for before, after in itertools.pairwise(heard))
