"""Adapters of tiny models, in files as PEFT writes them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(
    folder: Path, model: torch.nn.Module, names: tuple[str, ...], seed: int, rank: int = 4, **config: Any
) -> Path:
    """Save an adapter of all linears of these names as PEFT does, large enough to be seen."""
    made = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, linear in model.named_modules():
        if path.rpartition(".")[2] in names:
            down = torch.randn(rank, linear.in_features, generator=made) * 0.2
            up = torch.randn(linear.out_features, rank, generator=made) * 0.2
            tensors[f"base_model.model.{path}.lora_A.weight"] = down
            tensors[f"base_model.model.{path}.lora_B.weight"] = up
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(names), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**said, **config}))
    return folder
