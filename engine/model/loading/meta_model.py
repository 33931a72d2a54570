"""A model that is built on the meta device and filled part by part, so that no weight is in memory twice.

Parameters begin on the meta device, where a rank cuts them to its shard; `fill` then allocates them and reads their
values. Buffers are real from the start, because the class computes them.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.errors import ModelError
from engine.model.checkpoints.weight_mapping import Shape
from engine.model.checkpoints.weight_memory import WeightMemory, host_memory
from engine.model.composed_decoder import decoder_of
from engine.model.runtime.vocab_shard import VocabShard

Allocate = Callable[[Shape, torch.dtype], Tensor]


@dataclass(frozen=True, slots=True)
class ShardSlice:
    """A rank's part of a parameter: ranges (begin, length) along one dimension, concatenated.

    Without ranges the rank has nothing of the parameter, and its values are zeros.
    """

    dim: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class TargetParameter:
    """A parameter to fill.

    Args:
        path: its first path in the model.
        shape: in the whole model.
        shard: the rank's part, None for all of it.
        out: the tensor to fill, with the shape of the rank's part.
    """

    path: str
    shape: Shape
    shard: ShardSlice | None
    out: Tensor


class WeightSource(Protocol):
    """Fills parameters: from a checkpoint, or with random values."""

    def use(self, memory: WeightMemory) -> None:
        """All that is filled from now on is in this memory."""
        ...

    def fill(self, module: nn.Module, targets: dict[str, TargetParameter]) -> None:
        """Fill parameters of a module, keyed by their names within it."""
        ...

    def fill_buffer(self, path: str, out: Tensor) -> None:
        """Fill a buffer, if the source has it."""
        ...

    def close(self) -> None:
        """Release files; nothing is filled afterwards."""
        ...


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """A context in which modules create their parameters on the meta device."""
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


class MetaModel:
    """A model of transformers with parameters on the meta device, and the source of their values.

    Args:
        model: an instance of transformers' class, or an `Outline`.
        source: fills the parameters.
        keep_float32: names of parameters and buffers that stay float32 whatever the model's dtype is.
    """

    def __init__(self, model: Any, source: WeightSource, keep_float32: Sequence[str] = ()):
        self.model = model
        self.decoder = decoder_of(model)  # the model itself, if it has no towers
        self.seconds = 0.0  # spent in `fill`
        self.vocab_shard: VocabShard | None = None  # set if ranks divide the vocabulary
        self._source = source
        self._float32 = re.compile("|".join(rf"(?:^|\.){re.escape(name)}(?:\.|$)" for name in keep_float32) or r"(?!)")
        self._paths = {module: path for path, module in model.named_modules(remove_duplicate=False)}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._shapes: dict[str, Shape] = {path: tuple(parameter.shape) for path, parameter in parameters.items()}
        self._first = first_paths(parameters)
        self._shards: dict[str, ShardSlice] = {}
        self._filled: dict[str, nn.Parameter] = {}
        self._memory: WeightMemory = host_memory()

    def use(self, memory: WeightMemory) -> None:
        """Parameters that are filled from now on are made in this memory, where all buffers must be."""
        self._memory = memory
        self._source.use(memory)

    def path(self, module: nn.Module) -> str:
        """The path of a module in the model."""
        return self._paths[module]

    def cut(self, module: nn.Module, name: str, shard: ShardSlice) -> None:
        """Reduce a parameter of a module to a shard; parameters that are tied to it are reduced with it."""
        first = self._first[_join(self._paths[module], name)]
        shape = list(self._shapes[first])
        if shard.ranges:
            shape[shard.dim] = sum(length for _, length in shard.ranges)
        parameter = module._parameters[name]
        assert parameter is not None
        assert parameter.is_meta, f"{first} is filled already"
        self._shards[first] = shard
        smaller = nn.Parameter(parameter.new_empty(shape), requires_grad=False)
        for path, of in self._first.items():
            if of == first:
                owner, _, last = path.rpartition(".")
                self.model.get_submodule(owner)._parameters[last] = smaller

    def replace(self, module: nn.Module, by: nn.Module) -> None:
        """Put a module without weights in the place of one whose weights are not needed."""
        path = self._paths[module]
        owner, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(owner), name, by)
        self._paths[by] = path

    @contextlib.contextmanager
    def zeros(self, zeros: Allocate) -> Iterator[None]:
        """A context in which the parameters, none of which is filled yet, are zeros.

        Args:
            zeros: allocates them.
        """
        kept = [(module, dict(module._parameters)) for module in self._paths]
        made: dict[int, nn.Parameter] = {}
        for module, parameters in kept:
            for name, parameter in parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    whole = zeros(
                        tuple(parameter.shape), self._dtype(self._first[_join(self._paths[module], name)], parameter)
                    )
                    made[id(parameter)] = nn.Parameter(whole, requires_grad=False)
                module._parameters[name] = made[id(parameter)]
        try:
            yield
        finally:
            for module, parameters in kept:
                module._parameters.update(parameters)

    def fill(self, part: nn.Module | None = None) -> None:
        """Fill a part of the model, None for all of it. Raises ModelError if the weights can't be read."""
        self.fill_each((self.model if part is None else part).modules())

    def fill_each(self, modules: Iterable[nn.Module]) -> None:
        """Fill modules without those within them. Raises ModelError as `fill` does."""
        began = time.perf_counter()
        try:
            for module in modules:
                self._fill_module(module)
        except OSError as error:
            raise ModelError(f"the weights can't be read: {error}") from error
        self.seconds += time.perf_counter() - began

    def close(self) -> None:
        """Close the source; nothing is filled afterwards."""
        self._source.close()
        self._memory = host_memory()

    def _fill_module(self, module: nn.Module) -> None:
        path = self._paths[module]
        targets = {}
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            first = self._first[_join(path, name)]
            if first not in self._filled:
                out = self._memory.empty(tuple(parameter.shape), self._dtype(first, parameter))
                targets[name] = TargetParameter(first, self._shapes[first], self._shards.get(first), out)
                self._filled[first] = nn.Parameter(out, requires_grad=False)
            module._parameters[name] = self._filled[first]
        if targets:
            self._source.fill(module, targets)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                full = _join(path, name)
                if self._float32.search(full):
                    buffer = module._buffers[name] = buffer.float()
                self._source.fill_buffer(full, buffer)

    def _dtype(self, path: str, parameter: Tensor) -> torch.dtype:
        return torch.float32 if self._float32.search(path) else parameter.dtype


def first_paths(named: Mapping[str, Tensor]) -> dict[str, str]:
    """For each path the first path with the same tensor: itself, or the tensor that it is tied to."""
    seen: dict[int, str] = {}
    return {path: seen.setdefault(id(tensor), path) for path, tensor in named.items()}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
