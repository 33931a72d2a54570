"""Adapters (LoRA) as PEFT writes them: read, checked against the model, and cut to a rank's share."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.errors import ModelError
from engine.model.shard import shares_of
from engine.model.split import DIVIDED_INPUT, DIVIDED_OUTPUT, Split

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight")

# What changes more than sums of products with two small matrices.
_REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules (modules_to_save)",
    "alpha_pattern": "an alpha for each module (alpha_pattern)",
    "lora_bias": "biases (lora_bias)",
    "trainable_token_indices": "new tokens (trainable_token_indices)",
}


@dataclass(frozen=True, slots=True)
class LowRank:
    """What is added to a linear of x: up (down x). down: [rank, inputs]; up: [outputs, rank], with the scale in it."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True)
class Adapter:
    """By the path of a linear within the whole model."""

    linears: dict[str, LowRank]

    @property
    def bytes(self) -> int:
        return sum(one.down.nbytes + one.up.nbytes for one in self.linears.values())


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's folder; raises ModelError for what isn't one, or adds what isn't supported."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"{folder} isn't an adapter: it needs {CONFIG} and {WEIGHTS}, as PEFT saves them ({error})"
        ) from error
    if config.get("peft_type", "LORA") != "LORA":
        raise ModelError(f"{folder}: adapters of kind {config['peft_type']} aren't supported, LORA alone")
    for key, what in _REFUSED.items():
        if config.get(key):
            raise ModelError(f"{folder}: the adapter has {what}, which isn't supported")
    if config.get("bias", "none") != "none":
        raise ModelError(f"{folder}: the adapter has biases, which aren't supported")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        if found is None or tensor.ndim != 2:
            raise ModelError(f"{folder}: the adapter's tensor {name} isn't of a linear: that isn't supported")
        parts.setdefault(found["path"], {})[found["part"]] = tensor
    linears = {}
    for path, both in parts.items():
        if set(both) != {"A", "B"} or both["A"].shape[0] != both["B"].shape[1]:
            raise ModelError(f"{folder}: the adapter's two weights of {path} don't fit each other")
        rank = both["A"].shape[0]
        root = rank**0.5 if config.get("use_rslora") else rank
        linears[path] = LowRank(both["A"], both["B"] * (config.get("lora_alpha", rank) / root))
    if not linears:
        raise ModelError(f"{folder}: the adapter holds no weights")
    return Adapter(linears)


def check_adapter(adapter: Adapter, model: Any) -> None:
    """Raise ModelError if the model hasn't got a linear that the adapter adds to, in that size."""
    for path, part in adapter.linears.items():
        try:
            linear = model.get_submodule(path)
        except AttributeError:
            raise ModelError(f"the adapter adds to {path}, which this model hasn't got") from None
        if not isinstance(linear, nn.Linear) or linear is model.get_output_embeddings():
            raise ModelError(f"the adapter adds to {path}: of a {type(linear).__name__} that isn't supported")
        wanted = (linear.out_features, linear.in_features)
        if (part.up.shape[0], part.down.shape[1]) != wanted:
            raise ModelError(
                f"the adapter's weights of {path} are for {part.up.shape[0]} × {part.down.shape[1]} numbers, "
                f"the model's are {wanted[0]} × {wanted[1]}"
            )


def cut_adapter(adapter: Adapter, split: Split, rank: int, prefix: str) -> Adapter:
    """A rank's share: `up` along divided outputs, `down` along divided inputs; prefix: of the base model's paths."""
    linears = {}
    for path, part in adapter.linears.items():
        style = split.style(path.removeprefix(prefix))
        down, up = part.down, part.up
        if style in DIVIDED_OUTPUT:
            ranges = shares_of(style, len(up), split, rank)
            up = torch.cat([up.narrow(0, *one) for one in ranges])
        elif style in DIVIDED_INPUT:
            share = down.shape[1] // split.size
            down = down.narrow(1, rank * share, share).contiguous()
        linears[path] = LowRank(down, up)
    return Adapter(linears)
