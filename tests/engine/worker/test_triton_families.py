"""Every family as transformers' class with interpreted Triton attention equals transformers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from engine.worker import triton_stack
from engine.worker.torch_device import TorchDevice
from tests.engine.kernels.triton import quick
from tests.engine.worker.device_driver import make_device_driver
from tests.engine.worker.driver import MODELS, Driver, build_model
from tests.engine.worker.parity import Reference, compare, serve

quick.patch()


@pytest.fixture
def make_driver() -> Iterator[Callable[..., Driver]]:
    executors: list[Any] = []

    def make(folder: Path) -> Driver:
        driver = make_device_driver(TorchDevice("cpu"), folder, use_triton=True)
        executors.append(driver.executor)
        return driver

    yield make
    for executor in executors:
        executor.shutdown()


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_the_class_of_transformers_with_attention_in_triton(
    kind: str, tmp_path: Path, make_driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also families that the fused stack computes."""
    monkeypatch.setattr(triton_stack, "refusal", lambda *_: "not the stack")
    reference = Reference(build_model(kind, tmp_path))
    driver = make_driver(tmp_path)
    assert driver.executor.kernels == "triton (not the stack)"
    row = compare(kind, "chunked", serve(driver, "chunked"), reference)
    assert row.passed, row
