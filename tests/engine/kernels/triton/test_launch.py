"""Where arguments of kernels may be, and the dtypes they compute in."""

import pytest
import torch
import triton.language as tl

from engine.kernels.triton import launch


def test_kernels_are_interpreted_in_tests() -> None:
    assert launch.interpreted()
    assert launch.tokens_per_program(4) == launch.INTERPRETED_TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_of_the_interpreter_are_float32(dtype: torch.dtype) -> None:
    assert launch.dot_dtype(dtype) == tl.float32


def test_products_of_compiled_kernels_keep_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    assert launch.dot_dtype(torch.bfloat16) == tl.bfloat16
    assert launch.tokens_per_program(4) == 4


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="not in int8"):
        launch.dot_dtype(torch.int8)


def test_float32_is_not_rounded_to_tf32() -> None:
    assert launch.dot_precision(torch.float32) == "ieee"
    assert launch.dot_precision(torch.bfloat16) == "tf32"


@pytest.mark.parametrize(("number", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (80, 128), (128, 128), (129, 256)])
def test_next_power_of_2(number: int, power: int) -> None:
    assert launch.next_power_of_2(number) == power


def test_arguments_on_two_devices_are_refused() -> None:
    launch.check_device(torch.ones(1), None, torch.ones(2))
    with pytest.raises(RuntimeError, match="different devices: cpu, meta"):
        launch.check_device(torch.ones(1), torch.ones(1, device="meta"))


def test_a_stand_in_device_tells_its_tensors_from_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = torch.ones(1)
    monkeypatch.setattr(launch, "place_of", lambda tensor: "device" if tensor is mine else "host")
    with pytest.raises(RuntimeError, match="device, host"):
        launch.check_device(mine, torch.ones(1))


def test_compiled_kernels_refuse_tensors_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        launch.check_device(torch.ones(1))
