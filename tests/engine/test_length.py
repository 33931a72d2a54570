"""--max-model-len auto: as many tokens as memory suffices for."""

import dataclasses
from pathlib import Path

import pytest

from engine.config import AUTO_LENGTH, EngineConfig
from engine.devices.cpu import CpuMachine
from engine.errors import OutOfMemoryError
from engine.length import fit_length
from engine.memory import resolve
from engine.model.model_info import read_model_info
from tests.tiny import write_tiny

GIB = 1 << 30


def config(folder: Path, **more: object) -> EngineConfig:
    settings = {"max_model_len": AUTO_LENGTH, "load_format": "dummy", **more}
    return EngineConfig(model=write_tiny(folder), **settings)  # type: ignore[arg-type]


def test_enough_memory_gives_the_models_own_length(tmp_path: Path) -> None:
    found, available = fit_length(config(tmp_path), 8 * GIB)
    assert (found.max_model_len, available) == (4096, 8 * GIB)


@pytest.mark.parametrize("more", [{}, {"block_size": 16}, {"data_parallel_size": 2}])
def test_the_longest_that_fits_fits_and_a_block_more_does_not(more: dict[str, object], tmp_path: Path) -> None:
    asked = config(tmp_path, kv_cache_memory_bytes=1 << 19, **more)
    found, _ = fit_length(asked, 8 * GIB)
    length, block = found.max_model_len, asked.block_size or 32
    assert length is not None
    assert block <= length < 4096
    assert length % block == 0
    assert resolve(found, read_model_info(found), 8 * GIB).config.max_model_len == length
    longer = dataclasses.replace(asked, max_model_len=length + block)
    with pytest.raises(OutOfMemoryError):
        resolve(longer, read_model_info(longer), 8 * GIB)


def test_free_memory_decides_where_no_size_is_given(tmp_path: Path) -> None:
    asked = config(tmp_path, max_num_seqs=1, max_num_batched_tokens=1)
    least = CpuMachine(asked).workspace(read_model_info(asked), 1, 1, 32) + read_model_info(asked).weight_bytes
    found, available = fit_length(asked, 2 * least)
    assert available == 2 * least
    assert 32 <= (found.max_model_len or 0) < 4096


def test_not_even_a_block_is_an_error_that_says_what_would_help(tmp_path: Path) -> None:
    with pytest.raises(OutOfMemoryError, match=r"one request of 32 tokens needs .* --kv-cache-memory-bytes"):
        fit_length(config(tmp_path, kv_cache_memory_bytes=100), 8 * GIB)


def test_another_length_is_left_alone(tmp_path: Path) -> None:
    asked = config(tmp_path, max_model_len=100)
    assert fit_length(asked) == (asked, None)
