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
    "target_parameters": "parameters beside linears (target_parameters)",
    "layer_replication": "layers shown twice (layer_replication)",
    "alora_invocation_tokens": "tokens that call it up (alora_invocation_tokens)",
    "use_qalora": "pooled inputs (use_qalora)",
}
_CHANGE_BASE = ("pissa", "olora", "corda")  # take from the base model's weights what the adapter begins with
MOST_ALPHA = 1_000_000  # none that was trained comes near
DEFAULT_ALPHA = 8  # PEFT's, of a config that doesn't say


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
    config, tensors = _read_files(folder)
    try:
        _check_config(config)
        return Adapter({path: _low_rank(path, both, config) for path, both in _paired(tensors).items()})
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None


def _read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        for name in (CONFIG, WEIGHTS):
            if (folder / name).exists() and not (folder / name).is_file():
                raise ValueError(f"{name} is no file")  # a pipe or a device might never end
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8-sig"))
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, SafetensorError) as error:
        raise ModelError(
            f"{folder} isn't an adapter: it needs {CONFIG} and {WEIGHTS}, as PEFT saves them ({error})"
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder} isn't an adapter: {CONFIG} holds a {type(config).__name__}, not an object")
    return config, tensors


def _check_config(config: dict[str, Any]) -> None:
    """Raise ModelError for settings that can't hold, or mean more than sums of products with two small matrices."""
    if config.get("peft_type", "LORA") != "LORA":
        raise ModelError(f"adapters of kind {config['peft_type']} aren't supported, LORA alone")
    for key, what in _REFUSED.items():
        if config.get(key):
            raise ModelError(f"the adapter has {what}, which isn't supported")
    if config.get("bias", "none") != "none":
        raise ModelError("the adapter has biases, which aren't supported")
    started = config.get("init_lora_weights", True)
    if isinstance(started, str) and started.lower().startswith(_CHANGE_BASE):
        raise ModelError(
            f"the adapter began as {started!r} (init_lora_weights), which changes the base model: save it converted, "
            "with PEFT's path_initial_model_for_weight_conversion"
        )
    alpha, rank = config.get("lora_alpha", DEFAULT_ALPHA), config.get("r")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not -MOST_ALPHA <= alpha <= MOST_ALPHA:
        raise ModelError(f"{CONFIG}: lora_alpha must be a number up to {MOST_ALPHA:,}, not {str(alpha)[:40]}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ModelError(f"{CONFIG}: r, the rank, must be a whole number from 1 on, not {str(rank)[:40]}")


def _paired(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Both weights of each linear, by its path."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        if found is None or tensor.ndim != 2:
            raise ModelError(f"the adapter's tensor {name} isn't of a linear: that isn't supported")
        if not tensor.is_floating_point():
            raise ModelError(f"the adapter's tensor {name} holds {tensor.dtype}: numbers with a fraction are needed")
        whole = tensor.float()
        if not bool(whole.isfinite().all()):
            raise ModelError(f"the adapter's tensor {name} holds values that are no finite numbers (NaN or infinite)")
        parts.setdefault(found["path"], {})[found["part"]] = whole
    if not parts:
        raise ModelError("the adapter holds no weights")
    return parts


def _low_rank(path: str, both: dict[str, Tensor], config: dict[str, Any]) -> LowRank:
    if set(both) != {"A", "B"} or both["A"].shape[0] != both["B"].shape[1]:
        raise ModelError(f"the adapter's two weights of {path} don't fit each other")
    rank, given = both["A"].shape[0], config.get("r")
    if rank < 1:
        raise ModelError(f"the adapter's weights of {path} have rank 0")
    if given is not None and rank != given and not config.get("rank_pattern"):
        raise ModelError(f"the adapter's weights of {path} have rank {rank}, {CONFIG} says r = {given}")
    scale = config.get("lora_alpha", DEFAULT_ALPHA) / (rank**0.5 if config.get("use_rslora") else rank)
    up = both["B"] * scale
    if not bool(up.isfinite().all()):
        raise ModelError(f"lora_alpha is so large that the adapter's weights of {path} are no finite numbers")
    return LowRank(both["A"], up)


def check_adapter(adapter: Adapter, model: Any) -> None:
    """Raise ModelError if the model hasn't got a linear that the adapter adds to, in that size."""
    for path, part in adapter.linears.items():
        linear = _find(path, model)
        if not isinstance(linear, nn.Linear) or linear is model.get_output_embeddings():
            raise ModelError(f"the adapter adds to {path}: of a {type(linear).__name__} that isn't supported")
        _check_size(path, part, linear.out_features, linear.in_features)


def _find(path: str, model: Any) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ModelError(f"the adapter adds to {path}, which this model hasn't got") from None


def _check_size(path: str, part: LowRank, outputs: int, inputs: int) -> None:
    if (part.up.shape[0], part.down.shape[1]) != (outputs, inputs):
        raise ModelError(
            f"the adapter's weights of {path} are for {part.up.shape[0]} × {part.down.shape[1]} numbers, "
            f"the model's are {outputs} × {inputs}"
        )


def cut_adapter(adapter: Adapter, split: Split, rank: int, prefix: str, model: Any) -> Adapter:
    """A rank's share: `up` along divided outputs, `down` along divided inputs; prefix: of the base model's paths.

    `model` has the shapes of this rank's share; what doesn't fit them is left for `check_adapter`, ModelError says what
    can't even be divided.
    """
    linears = {}
    for path, part in adapter.linears.items():
        style = split.style(path.removeprefix(prefix))
        down, up = part.down, part.up
        if style in DIVIDED_OUTPUT or style in DIVIDED_INPUT:
            _check_divided(path, part, style in DIVIDED_OUTPUT, split, model)
        if style in DIVIDED_OUTPUT:
            ranges = shares_of(style, len(up), split, rank)
            up = torch.cat([up.narrow(0, *one) for one in ranges])
        elif style in DIVIDED_INPUT:
            share = down.shape[1] // split.size
            down = down.narrow(1, rank * share, share).contiguous()
        linears[path] = LowRank(down, up)
    return Adapter(linears)


def _check_divided(path: str, part: LowRank, by_outputs: bool, split: Split, model: Any) -> None:
    """Raise ModelError if a linear of all ranks together isn't of the size that the adapter adds to."""
    linear = _find(path, model)
    if not isinstance(linear, nn.Linear):
        return
    outputs = linear.out_features * (split.size if by_outputs else 1)
    inputs = linear.in_features * (1 if by_outputs else split.size)
    _check_size(path, part, outputs, inputs)
