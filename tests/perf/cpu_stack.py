"""The fused stack by itself, without scheduler and workers: for the scripts that measure kernels."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.config import EngineConfig
from engine.host import cores
from engine.kernels.cpu import build
from engine.kernels.cpu.bindings import Batch, Stack
from engine.model.kv_groups import group_layers, layer_windows
from engine.model.resolve import resolve_model
from engine.worker import fused_stack
from engine.worker.fused_stack import StackFormats

BLOCK = 32
# What `redline serve` takes as --quantization and --kv-cache-dtype, by a name for tables.
FORMS = {
    "bf16": StackFormats("bfloat16", "bfloat16", "bfloat16"),
    "int8": StackFormats("bfloat16", "int8", "int8"),
    "int8, KV bf16": StackFormats("bfloat16", "int8", "bfloat16"),
    "int4": StackFormats("bfloat16", "int4", "bfloat16"),
    "int4, KV int8": StackFormats("bfloat16", "int4", "int8"),
}


def folder_of(model: str) -> Path:
    return Path(resolve_model(EngineConfig(model=model).model, print))


def load(folder: Path, dtype: str) -> Any:
    """The model as transformers has it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().requires_grad_(False)


def make(folder: Path, form: StackFormats, num_blocks: int) -> tuple[Stack, int]:
    """A stack with the best kernels of this machine, and its vocabulary's size."""
    isas = build.supported_isas()
    if not isas:
        raise SystemExit("the CPU kernels need AVX2 or NEON")
    model = load(folder, form.dtype)
    groups = group_layers(layer_windows(model.config, model.config.max_position_embeddings))
    spec, owners = fused_stack.make_spec(model, form, num_blocks, BLOCK, groups, partial=False)
    return Stack(spec, form.weights, form.cache, cores(), isas[0], owners), spec.vocabulary


def batch_of(rows: list[tuple[NDArray[np.integer], int, NDArray[np.integer]]], *, every: bool = False) -> Batch:
    """Rows of (token ids, tokens before them, blocks); each samples once, or at every token."""
    counts = np.array([len(ids) for ids, _, _ in rows])
    starts = np.cumsum(counts) - counts
    tables = np.zeros((1, len(rows), max(len(blocks) for _, _, blocks in rows)), dtype=np.int32)
    for i, (_, _, blocks) in enumerate(rows):
        tables[0, i, : len(blocks)] = blocks
    columns = (
        starts, counts, [before for _, before, _ in rows], tables, np.concatenate([ids for ids, _, _ in rows]),
        np.concatenate([before + np.arange(len(ids)) for ids, before, _ in rows]),
        np.repeat(np.arange(len(rows)), counts), np.arange(counts.sum()) if every else starts + counts - 1,
    )  # fmt: skip
    return Batch.of(*columns)
