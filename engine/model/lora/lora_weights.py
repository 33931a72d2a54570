"""Reads LoRA adapters in PEFT's format, checks them against the model, and reduces them to a rank's shard."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.errors import ModelError
from engine.model.composed_decoder import ComposedDecoder
from engine.model.sharding.shard_model import output_ranges
from engine.model.sharding.tp_plan import DIVIDED_INPUT, DIVIDED_OUTPUT, TPPlan
from engine.model.stage import Stage

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight")

# Options that change a model by more than a product of two small matrices per linear.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules (modules_to_save)",
    "alpha_pattern": "an alpha per module (alpha_pattern)",
    "lora_bias": "biases (lora_bias)",
    "trainable_token_indices": "new tokens (trainable_token_indices)",
    "target_parameters": "parameters other than linears (target_parameters)",
    "layer_replication": "replicated layers (layer_replication)",
    "alora_invocation_tokens": "activation tokens (alora_invocation_tokens)",
    "use_qalora": "pooled inputs (use_qalora)",
}
_CHANGE_BASE = ("pissa", "olora", "corda")  # initializations that subtract the adapter from the base model's weights
MOST_ALPHA = 1_000_000  # far above any trained adapter
DEFAULT_ALPHA = 8  # PEFT's default


@dataclass(frozen=True, slots=True)
class LowRank:
    """Adds up (down x) to a linear's output.

    down: [rank, inputs], PEFT's A. up: [outputs, rank], PEFT's B times the scale.
    """

    down: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True)
class Adapter:
    """The weights of an adapter, by the path of the linear within the whole model."""

    linears: dict[str, LowRank]

    @property
    def nbytes(self) -> int:
        return sum(one.down.nbytes + one.up.nbytes for one in self.linears.values())


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's folder. Raises ModelError if it is not an adapter, or has parts that aren't supported."""
    config, tensors = _read_files(folder)
    try:
        _check_config(config)
        return Adapter({path: _low_rank(path, both, config) for path, both in _by_linear(tensors).items()})
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None


def _read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        for name in (CONFIG, WEIGHTS):
            if (folder / name).exists() and not (folder / name).is_file():
                raise ValueError(f"{name} is not a file")  # reading a pipe or a device might never end
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
    """Raise ModelError for wrong values, and for options that aren't supported."""
    if config.get("peft_type", "LORA") != "LORA":
        raise ModelError(f"adapters of type {config['peft_type']} aren't supported; only LORA is")
    for key, what in _UNSUPPORTED.items():
        if config.get(key):
            raise ModelError(f"the adapter has {what}, which isn't supported")
    if config.get("bias", "none") != "none":
        raise ModelError("the adapter has biases, which aren't supported")
    initialized = config.get("init_lora_weights", True)
    if isinstance(initialized, str) and initialized.lower().startswith(_CHANGE_BASE):
        raise ModelError(
            f"the adapter was initialized with {initialized!r} (init_lora_weights), which changes the base model: save "
            "it converted, with PEFT's path_initial_model_for_weight_conversion"
        )
    alpha, rank = config.get("lora_alpha", DEFAULT_ALPHA), config.get("r")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not -MOST_ALPHA <= alpha <= MOST_ALPHA:
        raise ModelError(f"{CONFIG}: lora_alpha must be a number up to {MOST_ALPHA:,}, not {str(alpha)[:40]}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ModelError(f"{CONFIG}: r, the rank, must be an integer of at least 1, not {str(rank)[:40]}")


def _by_linear(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The two weights, A and B, of each linear, by its path."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        if found is None or tensor.ndim != 2:
            raise ModelError(f"the adapter's tensor {name} doesn't belong to a linear layer, which isn't supported")
        if not tensor.is_floating_point():
            raise ModelError(f"the adapter's tensor {name} holds {tensor.dtype}: floating-point weights are needed")
        whole = tensor.float()
        if not bool(whole.isfinite().all()):
            raise ModelError(f"the adapter's tensor {name} has values that are not finite (NaN or infinite)")
        parts.setdefault(found["path"], {})[found["part"]] = whole
    if not parts:
        raise ModelError("the adapter has no weights")
    return parts


def _low_rank(path: str, both: dict[str, Tensor], config: dict[str, Any]) -> LowRank:
    if set(both) != {"A", "B"} or both["A"].shape[0] != both["B"].shape[1]:
        raise ModelError(f"the adapter's two weights of {path} don't fit each other")
    rank, declared = both["A"].shape[0], config.get("r")
    if rank < 1:
        raise ModelError(f"the adapter's weights of {path} have rank 0")
    if declared is not None and rank != declared and not config.get("rank_pattern"):
        raise ModelError(f"the adapter's weights of {path} have rank {rank}, but {CONFIG} has r = {declared}")
    scale = config.get("lora_alpha", DEFAULT_ALPHA) / (rank**0.5 if config.get("use_rslora") else rank)
    up = both["B"] * scale
    if not bool(up.isfinite().all()):
        raise ModelError(f"lora_alpha is so large that the adapter's weights of {path} are not finite")
    return LowRank(both["A"], up)


def check_adapter(adapter: Adapter, model: Any) -> None:
    """Raise ModelError if the model lacks a linear that the adapter changes, or has it in another shape."""
    if isinstance(model, ComposedDecoder):
        raise ModelError("adapters of models that take images or audio aren't supported")
    for path, part in adapter.linears.items():
        linear = _find(path, model)
        if not isinstance(linear, nn.Linear) or linear is model.get_output_embeddings():
            raise ModelError(f"the adapter changes {path}, a {type(linear).__name__}: only linears are supported")
        _check_shape(path, part, linear.out_features, linear.in_features)


def _find(path: str, model: Any) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ModelError(f"the adapter changes {path}, which this model does not have") from None


def _check_shape(path: str, part: LowRank, outputs: int, inputs: int) -> None:
    if (part.up.shape[0], part.down.shape[1]) != (outputs, inputs):
        raise ModelError(
            f"the adapter's weights of {path} have shape {part.up.shape[0]} × {part.down.shape[1]}, "
            f"the model's {outputs} × {inputs}"
        )


def stage_adapter(adapter: Adapter, stage: Stage, layers: str, num_layers: int) -> Adapter:
    """Reduce an adapter to the layers of a pipeline stage. What is outside of all layers stays.

    Raises ModelError for a layer that no stage has; what else does not fit is left to `check_adapter`.

    Args:
        adapter: the whole adapter.
        stage: of this process.
        layers: the path of the list of layers.
        num_layers: of the whole model.
    """
    number = re.compile(rf"{re.escape(layers)}\.(\d+)\.")
    linears = {}
    for path, part in adapter.linears.items():
        layer = number.match(path)
        if layer is not None and int(layer[1]) >= num_layers:
            raise ModelError(f"the adapter changes {path}, but the model has {num_layers} layers")
        if layer is None or int(layer[1]) in stage.layers:
            linears[path] = part
    return Adapter(linears)


def shard_adapter(adapter: Adapter, tp_plan: TPPlan, rank: int, prefix: str, model: Any) -> Adapter:
    """Reduce an adapter to a rank's shard: `up` along divided outputs, `down` along divided inputs.

    Raises ModelError for a linear of another size than the model's; what else does not fit is left to `check_adapter`.

    Args:
        adapter: the whole adapter.
        tp_plan: how ranks divide the model.
        rank: of this process.
        prefix: what the paths of the base model begin with.
        model: the rank's shard of the model.
    """
    linears = {}
    for path, part in adapter.linears.items():
        style = tp_plan.style(path.removeprefix(prefix))
        down, up = part.down, part.up
        if style in DIVIDED_OUTPUT or style in DIVIDED_INPUT:
            _check_whole(path, part, style in DIVIDED_OUTPUT, tp_plan, model)
        if style in DIVIDED_OUTPUT:
            ranges = output_ranges(style, len(up), tp_plan, rank)
            up = torch.cat([up.narrow(0, *one) for one in ranges])
        elif style in DIVIDED_INPUT:
            inputs = down.shape[1] // tp_plan.size
            down = down.narrow(1, rank * inputs, inputs).contiguous()
        linears[path] = LowRank(down, up)
    return Adapter(linears)


def _check_whole(path: str, part: LowRank, by_outputs: bool, tp_plan: TPPlan, model: Any) -> None:
    """Raise ModelError unless the adapter fits a divided linear of all ranks together."""
    linear = _find(path, model)
    if not isinstance(linear, nn.Linear):
        return
    outputs = linear.out_features * (tp_plan.size if by_outputs else 1)
    inputs = linear.in_features * (1 if by_outputs else tp_plan.size)
    _check_shape(path, part, outputs, inputs)
