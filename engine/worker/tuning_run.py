"""One run of `redline profile --tune` on this process's GPU. Needs the package `triton`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig
from engine.devices.tile_files import read_table
from engine.errors import ConfigError, OutOfMemoryError
from engine.kernels.tile_table import Launch, TileTable
from engine.kernels.triton.attention import AttentionShape
from engine.kernels.triton.launch import Gpu, current_gpu
from engine.kernels.triton.limits import attention_refusal
from engine.model.model_info import read_model_info
from engine.worker.attention_tuning import TunedShape, table_of, tune_attention
from engine.worker.cuda_device import CudaDevice
from engine.worker.tile_tuning import Choice, DeviceTimer


def tuned_shape(
    heads: int, kv_heads: int, head_dim: int, dtype: str, block_size: int, *, quantized: bool
) -> TunedShape:
    """Raises ConfigError if the kernels don't compute such a layer."""
    refusal = attention_refusal(heads, kv_heads, head_dim)
    if refusal is not None:
        raise ConfigError(f"the Triton kernels don't compute this attention: {refusal}")
    return TunedShape(AttentionShape(heads, kv_heads, head_dim, block_size), getattr(torch, dtype), quantized)


def tuned_shape_of_model(model: str, dtype: str | None, block_size: int, *, quantized: bool) -> TunedShape:
    """The shape of a model's layers; needs only its configuration, not its weights.

    Args:
        dtype: None: the model's.

    Raises ConfigError if the kernels don't compute such layers, and ModelError if the model can't be read.
    """
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    info = read_model_info(EngineConfig(model=model, load_format="dummy", **options))
    return tuned_shape(
        info.num_heads, info.num_kv_heads, info.head_dim, info.dtype, block_size, quantized=quantized
    )  # fmt: skip


def tune_gpu(
    tuned: TunedShape, path: Path, progress: Callable[[int, int, str], None]
) -> tuple[TileTable, dict[Launch, Choice]]:
    """Measure, and add the fastest tiles to the table of a file, if it exists.

    Raises ConfigError if the file is not a table for this GPU, or if no tile can be used, and OutOfMemoryError.
    """
    device = CudaDevice()
    device.bind_thread()
    gpu = current_gpu()
    table = _old_table(path, gpu)
    try:
        choices = tune_attention(device, tuned, gpu, DeviceTimer(device), progress)
    except torch.OutOfMemoryError:
        raise OutOfMemoryError(
            "the GPU has too little free memory for the KV caches that are measured: end other programs that use it"
        ) from None
    return table.merge(table_of(choices, tuned, gpu.target)), choices


def _old_table(path: Path, gpu: Gpu) -> TileTable:
    """Read before anything is measured, so that a wrong file is reported at once."""
    return read_table(path, gpu.target) if path.exists() else TileTable(gpu.target)
