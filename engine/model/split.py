"""Plans how ranks share a model's weights, by the tensor-parallel plan of its own class, before anything is loaded."""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.config import EngineConfig
from engine.errors import ConfigError, ModelError
from engine.model.facts import ModelFacts, parameter_shapes, read_config
from engine.model.families import FAMILIES, Family

# Styles of a linear: its output, or its input, is divided; with `_gather` and `_split` only the weights are. Queries,
# keys and values, or gate and up, that lie side by side in one linear are divided each for itself.
QKV, GATE_UP = "qkv", "gate_up"
DIVIDED_OUTPUT = {"colwise", "colwise_gather_output", QKV, GATE_UP}
DIVIDED_INPUT = {"rowwise", "rowwise_split_input"}
WHOLE = {"replicated_with_grad_allreduce"}
# Of a module of experts, whose outputs are summed over ranks, and of what it holds: one tensor for all experts.
EXPERTS = "moe_tp_experts"
PACKED = "packed_colwise"
# Of a parameter: divided along that dimension; with the first rank alone, zeros elsewhere.
CUTS = {"cut 0": 0, "cut -1": -1, "cut -2": -2}
FIRST_RANK = "first rank"
# Of an RMSNorm over what ranks have divided.
NORM = "norm"
STYLES = {*DIVIDED_OUTPUT, *DIVIDED_INPUT, *WHOLE, *CUTS, EXPERTS, PACKED, FIRST_RANK, NORM}

_ATTENTION = re.compile(r"\.(self_attn|attention|attn)\.")
_EXPERT = re.compile(r"\.experts\.")
_VOCABULARY = re.compile(r"(?:^|\.)(?:embed_tokens|embed_in|wte|lm_head|embed_out)\.(?:weight|bias)$")


@dataclass(frozen=True)
class Split:
    """What each of `size` ranks gets.

    styles: path of a module or parameter with * for the layer's number -> style; divides_heads: each rank attends with
    its own heads; rank: the facts of the model as one rank runs it; weight_bytes: of all ranks together, what is
    replicated counted for each.
    """

    size: int
    styles: dict[str, str]
    family: Family
    divides_heads: bool
    rank: ModelFacts
    weight_bytes: int
    warnings: tuple[str, ...] = ()

    def style(self, path: str) -> str | None:
        """The style of a module or parameter of the base model, None if every rank has all of it."""
        return self.styles.get(re.sub(r"(?<=\.)\d+(?=\.)", "*", path))


def plan_split(config: EngineConfig, facts: ModelFacts) -> Split:
    """Divide a model among `--tp` ranks.

    Raises ModelError if the plan of its class is missing or has styles that aren't known here, ConfigError if its
    dimensions aren't divisible, naming the values that work.
    """
    size = config.tensor_parallel_size
    settings = read_config(facts.path, config)
    family = FAMILIES.get(settings.model_type, Family())
    styles = dict(family.ranks or getattr(settings, "base_model_tp_plan", None) or {})
    refusal = f"{config.model} can't be divided among ranks (--tp {size}): "
    if not styles:
        raise ModelError(f"{refusal}transformers has no tensor-parallel plan for {facts.architecture}; use --tp 1")
    unknown = sorted(set(styles.values()) - STYLES)
    if unknown:
        raise ModelError(f"{refusal}its plan divides weights in ways not supported: {', '.join(unknown)}; use --tp 1")
    shapes = parameter_shapes(config, facts)
    divides_heads = any(_ATTENTION.search(path) and style in ("colwise", QKV) for path, style in styles.items())
    lengths = set(_divided_lengths(styles, shapes, settings, family))
    if divides_heads:
        lengths |= {facts.num_heads, facts.num_kv_heads}
    odd = [length for length in sorted(lengths) if length % size]
    if odd:
        raise ConfigError(f"{refusal}{_dimensions(facts, odd)} don't divide so; {_ways(math.gcd(*lengths))}")
    divided = sum(math.prod(shape) for name, shape in shapes.items() if _is_divided(name, styles, family))
    whole = sum(map(math.prod, shapes.values())) - divided
    per_rank = -(-divided // size) + whole
    each = facts.weight_bytes * per_rank // (divided + whole)
    heads = size if divides_heads else 1
    rank = dataclasses.replace(
        facts,
        num_heads=facts.num_heads // heads,
        num_kv_heads=facts.num_kv_heads // heads,
        intermediate_size=-(-facts.intermediate_size // size),
        weight_bytes=each,
        kv_bytes_per_token=facts.kv_bytes_per_token // heads,
    )
    warnings: tuple[str, ...] = ()
    if not divides_heads:
        warnings = (f"--tp {size}: {facts.architecture} attends undivided: each rank keeps the KV cache of all heads",)
    total = facts.weight_bytes * (divided + size * whole) // (divided + whole)
    return Split(size, styles, family, divides_heads, rank, total, warnings)


def _pattern(path: str) -> "re.Pattern[str]":
    return re.compile(rf"(?:^|\.){re.escape(path)}$".replace(r"\*", r"\d+"))


def _divided_lengths(
    styles: dict[str, str], shapes: dict[str, tuple[int, ...]], settings: Any, family: Family
) -> Iterator[int]:
    """The lengths that the number of ranks must divide, but for those of queries, keys and values."""
    outputs, inputs = (1, 0) if family.transposed else (0, 1)
    for path, style in styles.items():
        if style in (DIVIDED_OUTPUT | DIVIDED_INPUT) - {QKV}:
            weight = _pattern(f"{path}.weight")
            for name, shape in shapes.items():
                if weight.search(name):
                    length = shape[outputs if style in DIVIDED_OUTPUT else inputs]
                    yield length // 2 if style == GATE_UP else length
        elif style == EXPERTS:  # checkpoints name and pack experts in several ways: the config is plain
            width = getattr(settings, "moe_intermediate_size", None) or getattr(settings, "intermediate_size", None)
            if width:
                yield width


def _is_divided(name: str, styles: dict[str, str], family: Family) -> bool:
    """Whether all ranks together hold a parameter once: divided, or with the first rank only."""
    of_itself = {style for path, style in styles.items() if _pattern(path).search(name)}
    if _VOCABULARY.search(name) or of_itself & set(CUTS):
        return True
    if _EXPERT.search(name) and EXPERTS in styles.values():
        return FIRST_RANK not in of_itself
    module, _, own = name.rpartition(".")
    of_module = {style for path, style in styles.items() if _pattern(path).search(module)}
    if own == "bias" and family.transposed and of_module & DIVIDED_INPUT:
        return False  # zeros on the other ranks
    return bool(of_module & (DIVIDED_OUTPUT | DIVIDED_INPUT | {NORM}))


def _dimensions(facts: ModelFacts, odd: list[int]) -> str:
    if facts.num_heads in odd or facts.num_kv_heads in odd:
        return f"its {facts.num_heads} heads and {facts.num_kv_heads} KV heads"
    return f"its weights of length {', '.join(map(str, odd))}"


def _ways(common: int) -> str:
    ways = [str(n) for n in range(1, common + 1) if common % n == 0]
    if len(ways) > 8:
        ways = [*ways[:8], "…"]
    return f"use --tp {' or '.join([', '.join(ways[:-1]), ways[-1]]) if len(ways) > 1 else ways[0]}"
