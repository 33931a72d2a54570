"""Plans how tensor-parallel ranks divide a model's weights, by the plan of its class, before anything is loaded."""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.config import EngineConfig
from engine.errors import ConfigError, ModelError
from engine.model.families import Family, family_of
from engine.model.model_info import ModelInfo, read_hf_config, weight_shapes

# Styles of a linear: its output or its input is divided. Those with `_gather` and `_split` divide only the weights; the
# ranks gather the output or split the input. Linears that hold several parts (queries, keys and values; gate and up)
# are divided part by part.
QKV, GATE_UP = "qkv", "gate_up"
DIVIDED_OUTPUT = {"colwise", "colwise_gather_output", QKV, GATE_UP}
DIVIDED_INPUT = {"rowwise", "rowwise_split_input"}
WHOLE = {"replicated_with_grad_allreduce"}
# Styles of a module of experts, whose outputs are summed over ranks, and of its parameter that holds all gate and up
# projections.
EXPERTS = "moe_tp_experts"
PACKED = "packed_colwise"
# Styles of a parameter: divided along a dimension; or whole on the first rank, zeros on the others.
CUTS = {"cut 0": 0, "cut -1": -1, "cut -2": -2}
FIRST_RANK = "first rank"
# Style of an RMSNorm over a dimension that is divided.
NORM = "norm"
STYLES = {*DIVIDED_OUTPUT, *DIVIDED_INPUT, *WHOLE, *CUTS, EXPERTS, PACKED, FIRST_RANK, NORM}

_ATTENTION = re.compile(r"\.(self_attn|attention|attn)\.")
_EXPERT = re.compile(r"\.experts\.")
_VOCABULARY = re.compile(r"(?:^|\.)(?:embed_tokens|embed_in|wte|lm_head|embed_out)\.(?:weight|bias)$")


@dataclass(frozen=True)
class TPPlan:
    """How `size` ranks divide a model.

    Args:
        size: number of ranks.
        styles: path of a module or parameter, with * for a layer's number, and its style.
        family: of the model.
        divides_heads: each rank computes the attention of its own heads.
        rank_info: the model as one rank runs it.
        weight_bytes: of all ranks together, replicated weights counted once per rank.
    """

    size: int
    styles: dict[str, str]
    family: Family
    divides_heads: bool
    rank_info: ModelInfo
    weight_bytes: int
    warnings: tuple[str, ...] = ()

    def style(self, path: str) -> str | None:
        """The style of a module or parameter of the base model; None if it is replicated."""
        return self.styles.get(re.sub(r"(?<=\.)\d+(?=\.)", "*", path))


def plan_tensor_parallel(config: EngineConfig, model_info: ModelInfo) -> TPPlan:
    """Divide a model among `--tp` ranks.

    Raises ModelError if its class has no plan or one with unknown styles, ConfigError if its dimensions are not
    divisible, naming the values that work.
    """
    size = config.tensor_parallel_size
    hf_config = read_hf_config(model_info.path, config).get_text_config(decoder=True)
    family = family_of(hf_config.model_type) or Family()
    tp_plan = family.tp_plan or getattr(hf_config, "base_model_tp_plan", None) or {}
    # The vocabulary is divided here in one way for all classes.
    styles = {path: style for path, style in tp_plan.items() if not _VOCABULARY.search(f"{path}.weight")}
    if getattr(hf_config, "qk_norm_type", None) == "olmo":  # Molmo 2 also has norms of single heads
        styles |= {f"layers.*.self_attn.{name}": NORM for name in ("q_norm", "k_norm")}
    refusal = f"{config.model} can't be divided among ranks (--tp {size}): "
    if not styles:
        raise ModelError(f"{refusal}transformers has no tensor-parallel plan for {model_info.architecture}; use --tp 1")
    unknown = sorted(set(styles.values()) - STYLES)
    if unknown:
        raise ModelError(f"{refusal}its plan has styles that aren't supported: {', '.join(unknown)}; use --tp 1")
    shapes = weight_shapes(config, model_info)
    divides_heads = any(_ATTENTION.search(path) and style in ("colwise", QKV) for path, style in styles.items())
    lengths = set(_divided_lengths(styles, shapes, hf_config, family))
    if divides_heads:
        lengths |= {model_info.num_heads, model_info.num_kv_heads}
    odd = [length for length in sorted(lengths) if length % size]
    if odd:
        dimensions = _dimensions(model_info, odd)
        raise ConfigError(f"{refusal}{dimensions} are not divisible by {size}; {_divisors(math.gcd(*lengths))}")
    divided = sum(math.prod(shape) for name, shape in shapes.items() if _is_divided(name, styles, family))
    whole = sum(map(math.prod, shapes.values())) - divided
    per_rank = -(-divided // size) + whole
    rank_bytes = model_info.weight_bytes * per_rank // (divided + whole)
    heads = size if divides_heads else 1
    rank_info = dataclasses.replace(
        model_info,
        num_heads=model_info.num_heads // heads,
        num_kv_heads=model_info.num_kv_heads // heads,
        intermediate_size=-(-model_info.intermediate_size // size),
        weight_bytes=rank_bytes,
        kv_bytes_per_token=model_info.kv_bytes_per_token // heads,
    )
    warnings: tuple[str, ...] = ()
    if not divides_heads:
        warnings = (
            f"--tp {size}: the attention of {model_info.architecture} is not divided: each rank keeps the KV cache of "
            "all heads",
        )
    total = model_info.weight_bytes * (divided + size * whole) // (divided + whole)
    return TPPlan(size, styles, family, divides_heads, rank_info, total, warnings)


def _pattern(path: str) -> "re.Pattern[str]":
    return re.compile(rf"(?:^|\.){re.escape(path)}$".replace(r"\*", r"\d+"))


def _divided_lengths(
    styles: dict[str, str], shapes: dict[str, tuple[int, ...]], hf_config: Any, family: Family
) -> Iterator[int]:
    """Dimensions that must be divisible by the number of ranks, except those of joint queries, keys and values."""
    outputs, inputs = (1, 0) if family.transposed else (0, 1)
    for path, style in styles.items():
        if style in (DIVIDED_OUTPUT | DIVIDED_INPUT) - {QKV}:
            weight = _pattern(f"{path}.weight")
            for name, shape in shapes.items():
                if weight.search(name):
                    length = shape[outputs if style in DIVIDED_OUTPUT else inputs]
                    yield length // 2 if style == GATE_UP else length
        elif style == EXPERTS:  # from the config, since checkpoints name and pack experts in several ways
            width = getattr(hf_config, "moe_intermediate_size", None) or getattr(hf_config, "intermediate_size", None)
            if width:
                yield width


def _is_divided(name: str, styles: dict[str, str], family: Family) -> bool:
    """Whether all ranks together hold a parameter once: divided, or on the first rank only."""
    own_styles = {style for path, style in styles.items() if _pattern(path).search(name)}
    if _VOCABULARY.search(name) or own_styles & set(CUTS):
        return True
    if _EXPERT.search(name) and EXPERTS in styles.values():
        return FIRST_RANK not in own_styles
    module, _, last = name.rpartition(".")
    module_styles = {style for path, style in styles.items() if _pattern(path).search(module)}
    if last == "bias" and family.transposed and module_styles & DIVIDED_INPUT:
        return False  # zeros on the other ranks
    return bool(module_styles & (DIVIDED_OUTPUT | DIVIDED_INPUT | {NORM}))


def _dimensions(model_info: ModelInfo, odd: list[int]) -> str:
    if model_info.num_heads in odd or model_info.num_kv_heads in odd:
        return f"its {model_info.num_heads} heads and {model_info.num_kv_heads} KV heads"
    return f"its weights of length {', '.join(map(str, odd))}"


def _divisors(common: int) -> str:
    sizes = [str(n) for n in range(1, common + 1) if common % n == 0]
    if len(sizes) > 8:
        sizes = [*sizes[:8], "…"]
    return f"use --tp {' or '.join([', '.join(sizes[:-1]), sizes[-1]]) if len(sizes) > 1 else sizes[0]}"
