"""A model that is built before it has any numbers, and filled part by part: nothing is in memory twice.

Parameters begin on the meta device, where a rank cuts them to its share; `fill` then gives them memory and numbers.
Buffers are real from the start: the class computes them.
"""

import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.errors import ModelError
from engine.model.native import Readable
from engine.model.reader import Reader
from engine.model.recipe import Piece, Recipe, Shape
from engine.model.vocabulary import Slice


@dataclass(frozen=True, slots=True)
class Cut:
    """What a rank has of a parameter: ranges (begin, length) along one dimension, laid end to end.

    No ranges: nothing of it, its numbers are zeros.
    """

    dim: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A parameter to fill.

    path: the first that the model has for it; shape: in the whole model; cut: the rank's, if any; to: where numbers go.
    """

    path: str
    shape: Shape
    cut: Cut | None
    to: Tensor


class Source(Protocol):
    """Where numbers come from."""

    def fill(self, module: nn.Module, wanted: dict[str, Wanted]) -> None:
        """Fill parameters of a module, by its own names for them."""
        ...

    def buffer(self, path: str, to: Tensor) -> None:
        """Fill a buffer, if the source has it."""
        ...

    def close(self) -> None:
        """Nothing more will be filled."""
        ...


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within it modules get their parameters on the meta device."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class Blank:
    """A model of transformers on the meta device, and its source.

    `kept_exact` matches the names of parameters and buffers that stay float32 whatever the model's dtype is.
    """

    def __init__(self, model: Any, source: Source, kept_exact: Sequence[str] = ()):
        self.model = model
        self.seconds = 0.0  # spent filling
        self.vocabulary: Slice | None = None  # the rank's, where ranks divide it
        self._source = source
        self._exact = re.compile("|".join(rf"(?:^|\.){re.escape(name)}(?:\.|$)" for name in kept_exact) or r"(?!)")
        self._paths = {module: path for path, module in model.named_modules(remove_duplicate=False)}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._shapes: dict[str, Shape] = {path: tuple(parameter.shape) for path, parameter in parameters.items()}
        self._first = first_paths(parameters)
        self._cuts: dict[str, Cut] = {}
        self._filled: dict[str, nn.Parameter] = {}

    def path(self, module: nn.Module) -> str:
        """Where in the model a module is."""
        return self._paths[module]

    def cut(self, module: nn.Module, name: str, cut: Cut) -> None:
        """Leave only a part of a module's parameter; what shares it is cut with it."""
        first = self._first[_join(self._paths[module], name)]
        shape = list(self._shapes[first])
        if cut.ranges:
            shape[cut.dim] = sum(length for _, length in cut.ranges)
        parameter = module._parameters[name]
        assert parameter is not None
        assert parameter.is_meta, f"{first} has its numbers already"
        self._cuts[first] = cut
        smaller = nn.Parameter(parameter.new_empty(shape), requires_grad=False)
        for path, of in self._first.items():
            if of == first:
                owner, _, last = path.rpartition(".")
                self.model.get_submodule(owner)._parameters[last] = smaller

    def fill(self, part: nn.Module | None = None) -> None:
        """Give a part of the model, or all of it, its numbers; raises ModelError if they can't be read."""
        began = time.perf_counter()
        try:
            for module in (self.model if part is None else part).modules():
                self._fill_module(module)
        except OSError as error:
            raise ModelError(f"the weights can't be read: {error}") from error
        self.seconds += time.perf_counter() - began

    def close(self) -> None:
        """Let the source go: the model is filled, or won't be."""
        self._source.close()

    def _fill_module(self, module: nn.Module) -> None:
        path = self._paths[module]
        wanted = {}
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            first = self._first[_join(path, name)]
            if first not in self._filled:
                dtype = torch.float32 if self._exact.search(first) else parameter.dtype
                tensor = torch.empty(parameter.shape, dtype=dtype)
                wanted[name] = Wanted(first, self._shapes[first], self._cuts.get(first), tensor)
                self._filled[first] = nn.Parameter(tensor, requires_grad=False)
            module._parameters[name] = self._filled[first]
        if wanted:
            self._source.fill(module, wanted)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                full = _join(path, name)
                if self._exact.search(full):
                    buffer = module._buffers[name] = buffer.float()
                self._source.buffer(full, buffer)


def first_paths(named: Mapping[str, Tensor]) -> dict[str, str]:
    """For each path the first that has the same tensor: its own, or that of what it is tied to."""
    seen: dict[int, str] = {}
    return {path: seen.setdefault(id(tensor), path) for path, tensor in named.items()}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


class StoredSource:
    """A checkpoint's files; `progress` hears the bytes of each piece that was read."""

    def __init__(self, stored: dict[str, Readable], recipe: Recipe, progress: Callable[[int], None] | None = None):
        self._stored = stored
        self._recipe = recipe
        self._reader = Reader()
        self._progress = progress or (lambda _: None)

    def fill(self, module: nn.Module, wanted: dict[str, Wanted]) -> None:
        del module
        for parameter in wanted.values():
            if parameter.cut is not None and not parameter.cut.ranges:
                parameter.to.zero_()
                continue
            for piece in self._recipe.pieces[parameter.path]:
                self._copy(piece, parameter.cut, parameter.to)

    def buffer(self, path: str, to: Tensor) -> None:
        for piece in self._recipe.pieces.get(path, ()):
            self._copy(piece, None, to)

    def close(self) -> None:
        self._reader.close()

    def _copy(self, piece: Piece, cut: Cut | None, to: Tensor) -> None:
        stored = self._stored[piece.stored]
        leading = len(piece.shape) - len(stored.shape)
        for begin, source, length, dim in _parts(piece, cut):
            at, first, shape = list(piece.begin), [0] * len(piece.shape), list(piece.shape)
            if cut is not None:
                at[dim], first[dim], shape[dim] = begin, source, length
            box = to
            for i in at[:leading]:
                box = box[i]
            inner = tuple(slice(a, a + n) for a, n in zip(at[leading:], shape[leading:], strict=True))
            self._reader.copy(stored, tuple(first[leading:]), box[inner])
        self._progress(stored.bytes)


def _parts(piece: Piece, cut: Cut | None) -> Iterator[tuple[int, int, int, int]]:
    """What a cut has of a piece: where it goes, where it begins in the piece, its length, and the dimension."""
    if cut is None:
        yield 0, 0, 0, 0
        return
    dim = cut.dim % len(piece.shape)
    first, end = piece.begin[dim], piece.begin[dim] + piece.shape[dim]
    before = 0
    for begin, length in cut.ranges:
        low, high = max(begin, first), min(begin + length, end)
        if low < high:
            yield before + low - begin, low - first, high - low, dim
        before += length


class RandomSource:
    """Random numbers, as the class begins its training with; a parameter's depend on the seed and its place alone."""

    def __init__(self, model: Any, seed: int):
        self._model = model
        self._seed = seed

    def fill(self, module: nn.Module, wanted: dict[str, Wanted]) -> None:
        held = dict(module._parameters)
        place = next(iter(wanted.values())).path
        digest = hashlib.sha256(f"{self._seed} {place}".encode()).digest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(digest[:8], "little"))
            for name, parameter in wanted.items():
                whole = torch.ones(parameter.shape, dtype=parameter.to.dtype)
                if whole.ndim > 1:  # in case the class doesn't say how such a parameter begins
                    whole.normal_(std=0.02)
                module._parameters[name] = nn.Parameter(whole, requires_grad=False)
            self._model._init_weights(module)
        for name, parameter in wanted.items():
            whole = module.get_parameter(name)
            cut = parameter.cut
            if cut is None:
                parameter.to.copy_(whole)
            elif not cut.ranges:
                parameter.to.zero_()
            else:
                parameter.to.copy_(torch.cat([whole.narrow(cut.dim, *part) for part in cut.ranges], cut.dim))
        module._parameters.update(held)

    def buffer(self, path: str, to: Tensor) -> None:
        """Buffers begin as the class made them."""

    def close(self) -> None:
        """Nothing was opened."""
