"""Weights reach a device a band of a file at a time: the host never holds more than a small part of a checkpoint."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from engine.model.checkpoints import reader
from engine.model.loading.open_model import open_model
from engine.worker.device_builder import build_device_runner
from engine.worker.device_runner import DeviceRunner
from engine.worker.torch_device import TorchDevice
from tests.engine.worker.device_driver import configure
from tests.engine.worker.driver import build_model
from tests.engine.worker.stand_in_device import StandInDevice

BAND = 4096
LARGE = {"num_hidden_layers": 12, "hidden_size": 64, "intermediate_size": 160}


class HostBytes(TorchDispatchMode):
    """The most bytes that tensors of the host had at once, in the thread where this mode is entered."""

    def __init__(self, device: StandInDevice):
        super().__init__()
        self.peak = 0
        self._device = device
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Measured before an operation: only now is it known which results are the device's.
        self._live = {at: one for at, one in self._live.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(size for at, (_, size) in self._live.items() if not self._device.owns(at)))
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                reference = StorageWeakRef(tensor.untyped_storage())
                self._live[reference.cdata] = reference, tensor.untyped_storage().nbytes()
        return result


def in_a_thread(work: Callable[[], Any]) -> Any:
    """A stand-in device checks its thread until that ends."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def build(folder: Path, device: Any, use_triton: bool, progress: Any = None) -> tuple[Any, DeviceRunner]:
    config, model_info, resolved = configure(folder, num_blocks=400, kernels="torch")
    meta_model = open_model(config, model_info, progress)
    built = build_device_runner(config, model_info, resolved, meta_model, device, use_triton=use_triton)
    return meta_model, built.runner


@pytest.mark.parametrize(
    ("kind", "use_triton", "more"),
    [
        ("llama", False, LARGE),
        ("llama", True, LARGE),  # the fused stack
        ("mixtral", False, LARGE),  # several stored tensors make up a parameter
    ],
)
def test_the_host_holds_a_small_part_of_a_checkpoint(
    kind: str, use_triton: bool, more: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if use_triton:
        pytest.importorskip("triton")
    monkeypatch.setattr(reader, "BAND", BAND)
    build_model(kind, tmp_path, **more)
    size = (tmp_path / "model.safetensors").stat().st_size
    device, calls = StandInDevice(), list[tuple[int, int]]()
    counter = HostBytes(device)

    def work() -> None:
        with counter:
            build(tmp_path, device, use_triton, lambda *call: calls.append(call))

    in_a_thread(work)
    assert BAND <= counter.peak < size / 6
    done = [one for one, _ in calls]
    assert done == sorted(done)
    assert calls[-1][0] == calls[-1][1] <= size < calls[-1][1] * 1.1


def test_a_count_of_host_bytes_sees_weights_on_the_host(tmp_path: Path) -> None:
    build_model("llama", tmp_path, **LARGE)
    counter = HostBytes(StandInDevice())
    with counter:
        open_model(*configure(tmp_path)[:2]).fill()
    assert counter.peak > 0.9 * (tmp_path / "model.safetensors").stat().st_size


@pytest.mark.parametrize("device", [StandInDevice, lambda: TorchDevice("cpu")], ids=["stand-in", "torch"])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("deepseek_v3", {}),  # a buffer has numbers of the checkpoint
        ("gpt_oss", {}),
        ("gemma3_text", {"tie_word_embeddings": True}),  # buffers that the class computes
    ],
)
def test_parameters_and_buffers_on_the_device_are_those_of_transformers(
    kind: str, more: dict[str, Any], device: Callable[[], Any], tmp_path: Path
) -> None:
    model, made = build_model(kind, tmp_path, **more), device()

    def work() -> dict[str, Tensor]:
        _, runner = build(tmp_path, made, False)
        return {**dict(runner._backend._model.named_parameters(remove_duplicate=False)),  # type: ignore[attr-defined]
                **dict(runner._backend._model.named_buffers())}  # type: ignore[attr-defined]  # fmt: skip

    found = in_a_thread(work)
    wanted = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name
        assert tensor is not wanted[name]
    if isinstance(made, StandInDevice):
        assert all(made.has(tensor) for tensor in found.values())
    tied = bool(more.get("tie_word_embeddings"))
    assert (found["lm_head.weight"] is found["model.embed_tokens.weight"]) == tied
