"""The fused stack by itself, without scheduler and workers: for the scripts that measure kernels."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.config import EngineConfig
from engine.kernels.cpu import build
from engine.kernels.cpu.native import Batch, Stack
from engine.memory import cores
from engine.model import fused
from engine.model.fused import Form
from engine.model.kvgroups import group_layers, layer_windows
from engine.model.resolve import resolve_model

BLOCK = 32
# What `redline serve` takes as --quantization and --kv-cache-dtype, by a name for tables.
FORMS = {
    "bf16": Form("bfloat16", "bfloat16", "bfloat16"),
    "int8": Form("bfloat16", "int8", "int8"),
    "int8, KV bf16": Form("bfloat16", "int8", "bfloat16"),
    "int4": Form("bfloat16", "int4", "bfloat16"),
    "int4, KV int8": Form("bfloat16", "int4", "int8"),
}


def folder_of(model: str) -> Path:
    return Path(resolve_model(EngineConfig(model=model).model, print))


def load(folder: Path, dtype: str) -> Any:
    """The model as transformers has it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().requires_grad_(False)


def make(folder: Path, form: Form, num_blocks: int) -> tuple[Stack, int]:
    """A stack with the best kernels of this machine, and its vocabulary's size."""
    levels = build.levels()
    if not levels:
        raise SystemExit("the CPU kernels need AVX2")
    model = load(folder, form.dtype)
    groups = group_layers(layer_windows(model.config, model.config.max_position_embeddings))
    spec, kept = fused.make_spec(model, form, num_blocks, BLOCK, groups, partial=False)
    return Stack(spec, form.weights, form.cache, cores(), levels[0], kept), spec.vocabulary


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
