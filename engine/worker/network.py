"""The model as a runner sees it: either transformers' class with the paged attention, or the fused stack in C++."""

import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.config import EngineConfig, ResolvedConfig
from engine.errors import ConfigError
from engine.kernels import attention
from engine.kernels.attention import Ragged, Workspace
from engine.kernels.cpu import build, native
from engine.kernels.cpu.build import BuildError
from engine.kernels.cpu.native import Batch, Stack
from engine.memory import threads_per_rank
from engine.model import adapt, fused
from engine.model.adapt import Forward, KVCache
from engine.model.facts import ModelFacts
from engine.model.fused import Form
from engine.model.load import layout_of
from engine.model.shard import Group
from engine.worker.paging import PageSupply
from engine.worker.rows import Int64s, StepBatch
from engine.worker.sampler import SLICE, Float64s, pick, weigh
from engine.worker.threads import places


class Network(Protocol):
    """One rank's model and KV cache; a step's tokens are chosen from it before the next step runs."""

    def forward(self, batch: StepBatch) -> None:
        """Compute a step's tokens, up to where those that sample are known."""
        ...

    def logits(self, which: Int64s) -> Tensor:
        """Of some of the tokens that sample, [len(which), vocabulary]."""
        ...

    def choose(self, temperatures: NDArray[np.float32], numbers: Float64s) -> Int64s:
        """A token for each that samples: the likeliest where the temperature is 0, else drawn by a number in [0, 1)."""
        ...


class GenericNetwork:
    """Transformers' own class; the reference, and the path of every model without a stack of its own."""

    def __init__(self, model: nn.Module, cache: KVCache):
        self._model = model
        self._cache = cache
        self._workspace = Workspace(cache.layout.dtype)
        self._logits: Tensor | None = None

    def forward(self, batch: StepBatch) -> None:
        self._logits = None
        layout = self._cache.layout
        ragged = Ragged(batch.starts, batch.counts, batch.computed, batch.tables)
        index = attention.write_index(batch.tables, batch.row_of, batch.positions, layout)
        forward = Forward(self._cache, ragged, index, self._workspace)
        arguments: dict[str, Any] = {
            "input_ids": torch.from_numpy(batch.ids)[None],
            "position_ids": torch.from_numpy(batch.positions)[None],
            "use_cache": False,
        }
        if not len(batch.sampling):
            adapt.run(self._model.base_model, forward, arguments)  # type: ignore[arg-type]
            return
        arguments["logits_to_keep"] = torch.from_numpy(batch.sampled_at)
        self._logits = adapt.run(self._model, forward, arguments).logits[0]

    def logits(self, which: Int64s) -> Tensor:
        assert self._logits is not None
        return self._logits if len(which) == len(self._logits) else self._logits[torch.from_numpy(which)]

    def choose(self, temperatures: NDArray[np.float32], numbers: Float64s) -> Int64s:
        assert self._logits is not None
        tokens = np.empty(len(temperatures), dtype=np.int64)
        for start in range(0, len(tokens), SLICE):
            some = slice(start, start + SLICE)
            part = self._logits[some].float()
            # numpy's argmax is several times as fast as torch's on one row after the other.
            tokens[some] = part.numpy().argmax(-1)
            drawn = np.flatnonzero(temperatures[some])
            if len(drawn):
                weights = weigh(part[torch.from_numpy(drawn)], temperatures[some][drawn])
                tokens[some][drawn] = pick(weights, numbers[some][drawn])
        return tokens


class FusedNetwork:
    """The fused stack; of one rank, or of several that sum up after each attention and MLP."""

    def __init__(self, stack: Stack, vocabulary: int, group: Group | None, pages: PageSupply):
        self.stack = stack
        self._vocabulary = vocabulary
        self._group = group
        self._pages = pages
        weakref.finalize(self, pages.close)

    def forward(self, batch: StepBatch) -> None:
        columns = (
            batch.starts, batch.counts, batch.computed, batch.tables, batch.ids, batch.positions, batch.row_of,
            batch.sampled_at,
        )  # fmt: skip
        self._pages.reach(int(batch.tables.max()))
        stack = self.stack
        stack.begin(Batch.of(*columns))
        if self._group is None:
            stack.run(0, stack.parts)
            return
        stack.run(0, 1)
        for part in range(2, stack.parts + 1):
            self._group.all_reduce(torch.from_numpy(stack.partial()))
            stack.run(part, part)

    def logits(self, which: Int64s) -> Tensor:
        out = torch.empty(len(which), self._vocabulary)
        self.stack.logits(which.astype(np.int32), out.numpy())
        return out

    def choose(self, temperatures: NDArray[np.float32], numbers: Float64s) -> Int64s:
        return self.stack.choose(temperatures, numbers).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Built:
    """A network, what computes it in words, and what the user should know of that."""

    network: Network
    kernels: str
    warnings: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()  # where the threads of the rank stay, this one on the first


def build_network(
    config: EngineConfig, facts: ModelFacts, resolved: ResolvedConfig, model: Any, group: Group | None = None
) -> Built:
    """Choose kernels by --kernels, the machine and the model; takes the model's weights away where it repacks them.

    `facts` are the rank's. Raises ConfigError for kernels that this machine can't run.
    """
    levels, why = _levels(config)
    refused = False
    form = Form(facts.dtype, config.quantization or facts.dtype, config.kv_cache_dtype or facts.dtype)
    if levels:
        refusal = fused.refusal(model, form, resolved.block_size)
        refused = refusal is not None
        level, why = (None, refusal) if refused else _first_built(config, levels)
        if level is not None:
            partial = group is not None
            spec, kept = fused.make_spec(model, form, resolved.num_blocks, resolved.block_size, partial=partial)
            threads = threads_per_rank(config.tensor_parallel_size)
            cores = places(threads, group.rank if group else 0, config.tensor_parallel_size)
            stack = Stack(spec, form.weights, form.cache, threads, level, kept, cores)
            first = spec.layer[0]
            region = first.values - first.keys
            pages = PageSupply(kept, first.keys, 2 * spec.layers, region, region // resolved.num_blocks)
            return Built(FusedNetwork(stack, spec.vocabulary, group, pages), f"{level}, fused stack", cores=cores)
    for flag, value in (("--quantization", config.quantization), ("--kv-cache-dtype", config.kv_cache_dtype)):
        if value is not None:
            raise ConfigError(f"{flag} {value} needs the CPU's own kernels: {why}")
    cache = KVCache(facts.num_layers, resolved.num_blocks, layout_of(facts, resolved.block_size))
    slow = config.kernels == "auto" and not refused
    warnings = (f"{why}: torch computes the model, several times as slowly",) if slow else ()
    return Built(GenericNetwork(model, cache), f"torch ({why})", warnings)


def _levels(config: EngineConfig) -> tuple[list[str], str | None]:
    """The kernels' levels to try in turn, or why there are none."""
    if config.kernels == "torch":
        return [], "--kernels torch"
    if config.kernels == "auto":
        levels = build.levels()
        return levels, None if levels else "the CPU kernels need AVX2"
    missing = build.missing(config.kernels)
    if missing:
        raise ConfigError(f"--kernels {config.kernels}: this machine lacks {', '.join(missing)}; auto finds the best")
    return [config.kernels], None


def _first_built(config: EngineConfig, levels: list[str]) -> tuple[str | None, str | None]:
    """The first level that can be compiled (an old compiler doesn't know the newest), or None and the first cause."""
    causes = []
    for level in levels:
        try:
            native.load(level)
        except BuildError as error:
            if config.kernels != "auto":
                raise ConfigError(f"--kernels {level}: {error}") from error
            causes.append(str(error))
        else:
            return level, None
    return None, causes[0]
