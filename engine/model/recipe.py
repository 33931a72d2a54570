"""From the tensors of a checkpoint to the parameters of a class, by the conversions that transformers knows.

A checkpoint may have other names than the class, and hold apart what the class has in one tensor (its experts, say).
Every stored tensor becomes a piece: a box within a parameter.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import ModelError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stored tensor as a box within a parameter: its first index and shape there.

    The box may have leading dimensions of length 1 that the stored tensor lacks.
    """

    stored: str
    begin: Shape
    shape: Shape


@dataclass(frozen=True, slots=True)
class Recipe:
    """pieces: of each parameter or buffer, which they cover; unused: tensors that the class has no place for."""

    pieces: dict[str, list[Piece]]
    unused: list[str]


def make_recipe(model: Any, stored: Mapping[str, Shape], shapes: dict[str, Shape]) -> Recipe:
    """Place stored tensors in a class whose parameters and buffers have these shapes.

    Raises ModelError if some of a parameter stays without numbers, or a tensor has another shape than its place.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    pieces: dict[str, list[Piece]] = {}
    unused: list[str] = []
    parts: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, shapes)
        if target not in shapes:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, shapes)
        if target not in shapes:
            unused.append(name)
        elif pattern is None:
            pieces[target] = [_whole(name, stored[name], target, shapes[target])]
        else:
            parts[target][pattern].append(name)
    for target, of_patterns in parts.items():
        converter = of_pattern[next(iter(of_patterns))]
        columns = [of_patterns[pattern] for pattern in converter.source_patterns if pattern in of_patterns]
        pieces[target] = _merged(target, converter.operations, columns, stored)
    for name, placed in pieces.items():
        _check_cover(name, placed, shapes[name])
    return Recipe(pieces, unused)


def _whole(name: str, shape: Shape, target: str, wanted: Shape) -> Piece:
    if shape != wanted:
        raise ModelError(f"the checkpoint has {name} of shape {shape}, the model {target} of {wanted}")
    return Piece(name, (0,) * len(shape), shape)


def _merged(target: str, operations: list[Any], columns: list[list[str]], stored: Mapping[str, Shape]) -> list[Piece]:
    """Tensors in lists, one list a pattern: those of a list are stacked, the stacks laid side by side."""
    kinds = [type(operation).__name__ for operation in operations]
    dims: list[int] = [getattr(operation, "dim", 0) for operation in operations]
    stacked = kinds[:1] == ["MergeModulelist"] and dims[0] == 0
    joined = kinds[1:] if stacked else kinds
    if joined not in ([], ["Concatenate"]) or (not joined and len(columns) > 1) or not (stacked or joined):
        raise ModelError(f"{target} is made from the checkpoint by {', '.join(kinds)}, which isn't supported")
    pieces, before = [], 0
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
            pieces.append(Piece(name, tuple(begin), shape))
        before += width if stacked else 0
    return pieces


def _check_cover(target: str, pieces: list[Piece], wanted: Shape) -> None:
    """Pieces of one parameter never overlap, by how they are made: their sizes tell whether they cover it."""
    for piece in pieces:
        ends = [begin + length for begin, length in zip(piece.begin, piece.shape, strict=True)]
        if len(ends) != len(wanted) or any(end > length for end, length in zip(ends, wanted, strict=True)):
            raise ModelError(
                f"the checkpoint has {piece.stored} of shape {piece.shape}, which doesn't fit {target} of {wanted}"
            )
    if sum(math.prod(piece.shape) for piece in pieces) != math.prod(wanted):
        raise ModelError(f"the checkpoint lacks a part of {target}: {len(pieces)} tensors don't fill {wanted}")
