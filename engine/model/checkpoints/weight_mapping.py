"""Maps the tensors of a checkpoint to the parameters of a class, by the conversions that transformers knows.

A checkpoint may name tensors differently, and store apart what the class has in one parameter (experts, for example).
Each stored tensor fills a box within one parameter:

    checkpoint                                     parameter experts.gate_up_proj [2, 8, 6]
    experts.0.gate_proj [4, 6]                     [0, 0:4, :]
    experts.0.up_proj   [4, 6]                     [0, 4:8, :]
    experts.1.gate_proj [4, 6]                     [1, 0:4, :]
    experts.1.up_proj   [4, 6]                     [1, 4:8, :]

A stored tensor may also hold several parameters (queries, keys and values): then each has a part of it.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import ModelError

Shape = tuple[int, ...]

# Tensors of old checkpoints that the class computes itself.
COMPUTED = re.compile(r"inv_freq$|\.attn\.(masked_)?bias$|\.attention\.(masked_)?bias$")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a stored tensor lies within a parameter: first index and shape of its box.

    The box may have leading dimensions of length 1 that the stored tensor lacks. `source` is where the box begins
    within the stored tensor; None: it is the whole tensor.
    """

    stored: str
    begin: Shape
    shape: Shape
    source: Shape | None = None


@dataclass(frozen=True, slots=True)
class WeightMapping:
    """The placements that cover each parameter or buffer, and the stored tensors that the class has no place for."""

    placements: dict[str, list[Placement]]
    unused: list[str]


def map_weights(model: Any, stored: Mapping[str, Shape], shapes: dict[str, Shape]) -> WeightMapping:
    """Place the stored tensors in the parameters and buffers of a class.

    Raises ModelError if a parameter is only partly covered, or if a tensor does not have the shape of its place.

    Args:
        model: an instance of the class, for its conversions.
        stored: name and shape of each tensor of the checkpoint.
        shapes: name and shape of each parameter and buffer.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    placements: dict[str, list[Placement]] = {}
    unused: list[str] = []
    parts: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, shapes)
        if target not in shapes:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, shapes)
        if target not in shapes:
            unused.append(name)
        elif pattern is None:
            placements[target] = [_whole(name, stored[name], target, shapes[target])]
        elif len(converter_of[pattern].target_patterns) > 1:
            for path, placement in _divided(name, stored[name], target, converter_of[pattern], shapes):
                placements[path] = [placement]
        else:
            parts[target][pattern].append(name)
    for target, of_patterns in parts.items():
        converter = converter_of[next(iter(of_patterns))]
        columns = [of_patterns[pattern] for pattern in converter.source_patterns if pattern in of_patterns]
        placements[target] = _merged(target, converter.operations, columns, stored)
    for name, placed in placements.items():
        _check_cover(name, placed, shapes[name])
    return WeightMapping(placements, unused)


def map_exactly(stored: Mapping[str, Shape], shapes: Mapping[str, Shape]) -> WeightMapping | None:
    """Place tensors of a checkpoint that has the names and shapes of a class: None if any is named or shaped otherwise.

    Arguments as of `map_weights`.
    """
    used = {name: shape for name, shape in stored.items() if not COMPUTED.search(name)}
    if any(shapes.get(name) != shape for name, shape in used.items()):
        return None
    return WeightMapping({name: [Placement(name, (0,) * len(shape), shape)] for name, shape in used.items()}, [])


def _whole(name: str, shape: Shape, target: str, expected: Shape) -> Placement:
    if shape != expected:
        raise ModelError(f"the checkpoint has {name} of shape {shape}, the model {target} of {expected}")
    return Placement(name, (0,) * len(shape), shape)


def _merged(
    target: str, operations: list[Any], columns: list[list[str]], stored: Mapping[str, Shape]
) -> list[Placement]:
    """Place several tensors in one parameter.

    `columns` has one list of names per source pattern: the tensors of a list are stacked, the stacks concatenated.
    """
    kinds = [type(operation).__name__ for operation in operations]
    dims: list[int] = [getattr(operation, "dim", 0) for operation in operations]
    stacked = kinds[:1] == ["MergeModulelist"] and dims[0] == 0
    joined = kinds[1:] if stacked else kinds
    if joined not in ([], ["Concatenate"]) or (not joined and len(columns) > 1) or not (stacked or joined):
        raise ModelError(f"{target} is made from the checkpoint by {', '.join(kinds)}, which isn't supported")
    placements, before = [], 0
    for column in columns:
        width = 0
        for i, name in enumerate(column):
            shape = (1, *stored[name]) if stacked else stored[name]
            begin = [0] * len(shape)
            if stacked:
                begin[0] = i
            if joined:
                begin[dims[-1]] = before
                width = shape[dims[-1]]
                before += 0 if stacked else width
            placements.append(Placement(name, tuple(begin), shape))
        before += width if stacked else 0
    return placements


def _divided(
    name: str, shape: Shape, first_target: str, converter: Any, shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, Placement]]:
    """The parameters that a stored tensor holds one after the other, with their parts of it.

    `first_target` is the first of them.
    """
    kinds = [type(operation).__name__ for operation in converter.operations]
    if kinds not in (["Split"], ["Chunk"]):
        raise ModelError(f"{first_target} is made from the checkpoint by {', '.join(kinds)}, which isn't supported")
    dim: int = converter.operations[0].dim
    first_pattern, before = converter.target_patterns[0], 0
    for pattern in converter.target_patterns:
        target = first_target.replace(first_pattern, pattern)
        source = [0] * len(shape)
        source[dim] = before
        part = shapes[target]
        before += part[dim]
        yield target, Placement(name, (0,) * len(shape), part, tuple(source))
    if before != shape[dim]:
        raise ModelError(f"the checkpoint has {name} of shape {shape}, the parameters in it have a length of {before}")


def _check_cover(target: str, placements: list[Placement], expected: Shape) -> None:
    """Raise ModelError unless the placements cover the parameter. They never overlap, so their sizes suffice."""
    for placement in placements:
        ends = [begin + length for begin, length in zip(placement.begin, placement.shape, strict=True)]
        if len(ends) != len(expected) or any(end > length for end, length in zip(ends, expected, strict=True)):
            raise ModelError(
                f"the checkpoint has {placement.stored} of shape {placement.shape}, which doesn't fit {target} of "
                f"{expected}"
            )
    if sum(math.prod(placement.shape) for placement in placements) != math.prod(expected):
        raise ModelError(f"the checkpoint lacks a part of {target}: {len(placements)} tensors don't fill {expected}")
