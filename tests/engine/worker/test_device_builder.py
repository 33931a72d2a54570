"""Which kernels a model gets on a device, as the start table says it."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from engine.errors import ConfigError
from engine.model.loading.open_model import open_model
from engine.worker.device_builder import build_device_runner
from engine.worker.torch_device import TorchDevice
from tests.engine.kernels.triton import quick
from tests.engine.worker.device_driver import configure, make_device_driver
from tests.engine.worker.driver import Request, build_model

quick.patch()

ODD = {"hidden_size": 20, "n_embd": 20, "num_hidden_layers": 2, "n_layer": 2}  # 4 heads of 5 elements


@pytest.mark.parametrize(
    ("kind", "use_triton", "kernels"),
    [
        ("llama", True, "triton, fused stack"),
        ("gpt2", True, "triton ("),
        ("deepseek_v3", True, "triton ("),
        ("llama", False, "torch"),
    ],
)
def test_the_start_table_names_the_kernels(kind: str, use_triton: bool, kernels: str, tmp_path: Path) -> None:
    build_model(kind, tmp_path, num_hidden_layers=2)
    config, model_info, resolved = configure(tmp_path, num_blocks=100)
    model = open_model(config, model_info)
    built = build_device_runner(config, model_info, resolved, model, TorchDevice("cpu"), use_triton=use_triton)
    assert built.kernels.startswith(kernels)
    assert "\n" not in built.kernels


def test_heads_that_the_triton_kernels_refuse_get_the_attention_in_torch(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path, **ODD)
    driver = make_device_driver(TorchDevice("cpu"), tmp_path, use_triton=True)
    request = Request([3, 1, 4, 1, 5, 9, 2, 6])
    try:
        driver.run([request], 6, seed=1)
        kernels = driver.executor.kernels
    finally:
        driver.executor.shutdown()
    assert kernels == "torch (its heads have 5 elements, an odd number)"
    ids = torch.tensor([request.prompt])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
    assert request.output == expected[0, 8:].tolist()


def test_triton_kernels_that_were_asked_for_are_not_replaced(tmp_path: Path) -> None:
    build_model("gpt2", tmp_path, **ODD)
    config, model_info, resolved = configure(tmp_path, num_blocks=100, kernels="torch")
    model = open_model(config, model_info)
    config = type(config)(model=config.model, dtype="float32", kernels="triton")
    with pytest.raises(ConfigError, match=r"--kernels triton does not run this model \(its heads have 5"):
        build_device_runner(config, model_info, resolved, model, TorchDevice("cpu"), use_triton=True)
