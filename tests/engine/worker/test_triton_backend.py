"""Steps of an asynchronous device with interpreted Triton kernels give the CPU's tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

pytest.importorskip("triton")

from engine.kernels.triton import launch
from engine.model.loading.open_model import kv_layout
from engine.model.runtime.attention_interface import KVCache
from engine.worker.torch_device import TorchDevice
from tests.engine.kernels.triton import quick
from tests.engine.worker.device_driver import CoreDriver, configure, make_device_driver, start_executor
from tests.engine.worker.driver import build_model
from tests.engine.worker.parity import Reference, check_briefly
from tests.engine.worker.stand_in_device import StandInDevice
from tests.engine.worker.test_device_runner import SAMPLINGS, mixed_requests

quick.patch()


@pytest.mark.parametrize("kind", ["granite", "olmo3"])  # olmo3: layers with a window beside others without
def test_a_core_that_runs_ahead_gets_the_cpus_tokens(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"layer_types": ["sliding_attention", "full_attention"]} if kind == "olmo3" else {}
    build_model(kind, tmp_path, num_hidden_layers=2, **more)
    stand_in = StandInDevice(delay_s=0.2)
    monkeypatch.setattr(launch, "place_of", stand_in.place_of)
    requests, found = mixed_requests(SAMPLINGS, 5), []
    for device in (None, stand_in):
        executor, resolved = start_executor(device, tmp_path, use_triton=True, kernels="torch", max_model_len=100)
        try:
            found.append(CoreDriver(executor, resolved).run(requests, 5))
        finally:
            executor.shutdown()
    assert found[0] == found[1]
    assert stand_in.most_unready >= 2


def rounded(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """Keys or values as a cache in 8 bits holds them, with a scale for each token and head."""
    scale = x.abs().amax(-1, keepdim=True) / (127 if dtype == "int8" else 448)
    scaled = x / torch.where(scale > 0, scale, 1.0)
    return scale * (scaled.round() if dtype == "int8" else scaled.to(torch.float8_e4m3fn).float())


def attend_rounded(dtype: str) -> Any:
    """Causal attention to rounded keys and values, as transformers calls it."""

    def attend(_: Any, query: Any, key: Any, value: Any, __: Any, scaling: float, **___: Any) -> tuple[Any, None]:
        key, value = (rounded(x, dtype).repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        n, total = query.shape[2], key.shape[2]
        hidden = torch.ones(n, total, dtype=torch.bool).triu(total - n + 1)
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(hidden, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    return attend


@pytest.mark.parametrize(
    ("kind", "dtype", "converts"), [("llama", "int8", True), ("llama", "fp8", False), ("granite", "fp8", True)]
)
def test_a_cache_in_8_bits_equals_transformers_with_rounded_keys_and_values(
    kind: str, dtype: str, converts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tolerance as without: the scales and the rounding are the same."""
    model: Any = build_model(kind, tmp_path, num_hidden_layers=2)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "rounded", attend_rounded(dtype))
    model.set_attn_implementation("rounded")
    device = TorchDevice("cpu")
    monkeypatch.setattr(device, "converts_fp8", converts)
    driver = make_device_driver(device, tmp_path, use_triton=True, kv_cache_dtype=dtype)
    try:
        check_briefly(driver, Reference(model), seed=3)
    finally:
        driver.executor.shutdown()


@pytest.mark.parametrize(
    ("dtype", "stored"), [("int8", torch.int8), ("fp8", torch.float8_e4m3fn), ("fp8", torch.uint8)]
)
def test_the_bytes_of_a_cache_in_8_bits_are_those_that_are_planned(
    dtype: str, stored: torch.dtype, tmp_path: Path
) -> None:
    build_model("olmo3", tmp_path)
    _, model_info, resolved = configure(tmp_path, kv_cache_dtype=dtype, num_blocks=500)
    layout = kv_layout(model_info, resolved.block_size)
    zeros = TorchDevice("cpu").zeros
    cache = KVCache(model_info.kv_groups, resolved.num_blocks, layout, zeros, stored)
    tensors = [*cache.keys, *cache.values, *cache.key_scales, *cache.value_scales]
    assert {tensor.dtype for tensor in cache.keys} == {stored}
    planned = resolved.num_blocks * resolved.block_size * model_info.kv_bytes_per_token
    assert sum(tensor.nbytes for tensor in tensors if tensor is not None) == planned
