"""Starts executors for the tests of the worker and ends them."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.kernels.cpu import build
from engine.memory import resolve
from engine.model.model_info import read_model_info
from engine.worker.in_process import InProcessExecutor
from tests.engine.worker.driver import Driver
from tests.engine.worker.stage_threads import staged_driver


@pytest.fixture
def make_driver(request: pytest.FixtureRequest) -> Callable[..., Driver]:
    """Start an executor on a folder and wrap it into a driver."""

    def make(folder: Path, *, rows: int = 6, block_size: int = 4, num_blocks: int = 2000, **options: Any) -> Driver:
        options = {"dtype": "float32", **options}
        config = EngineConfig(model=str(folder), max_num_seqs=rows, block_size=block_size, **options)
        model_info = read_model_info(config)
        pool = model_info.kv_bytes_per_token * block_size * num_blocks
        config = dataclasses.replace(config, kv_cache_memory_bytes=pool)
        executor = InProcessExecutor(config, model_info, resolve(config, model_info).config)
        request.addfinalizer(executor.shutdown)
        windows = model_info.kv_groups.windows
        return Driver(executor, rows=rows, block_size=block_size, num_blocks=num_blocks, windows=windows)

    return make


@pytest.fixture
def make_staged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Driver]:
    """Start pipeline stages on a folder and wrap them into a driver; arguments as of `staged_driver`."""

    def make(folder: Path, stages: int, **options: Any) -> Driver:
        driver = staged_driver(folder, tmp_path_factory.mktemp("store") / "store", stages, **options)
        request.addfinalizer(driver.executor.shutdown)
        return driver

    return make


@pytest.fixture(scope="session", autouse=True)
def _whole_kernels() -> Iterator[None]:
    """Tests need all stacks: compiling a library of all of them takes less time than one for each."""
    library = build.library
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "library", lambda isa, folder=None, stack=None: library(isa, folder))
        yield


@pytest.fixture(scope="session", autouse=True)
def _forked_children(forked_children: None) -> None:
    """For all tests of the engine."""
