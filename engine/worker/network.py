"""The model as a runner sees it: either transformers' class with the paged attention, or the fused stack in C++."""

import functools
import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.config import EngineConfig, ResolvedConfig
from engine.errors import ConfigError
from engine.kernels.attention import Ragged, Workspace
from engine.kernels.cpu import build, native
from engine.kernels.cpu.build import BuildError
from engine.kernels.cpu.native import Batch, PackedAdapter, Spec, Stack
from engine.memory import threads_per_rank
from engine.model import adapt, fused
from engine.model.adapt import Forward, KVCache
from engine.model.adapters import by_layer, pack_adapter
from engine.model.blank import Blank
from engine.model.facts import ModelFacts
from engine.model.fused import Form
from engine.model.hooked import HookedAdapters
from engine.model.load import complete, layout_of
from engine.model.lora import Adapter, check_adapter
from engine.model.vocabulary import Slice
from engine.worker.paging import PageSupply
from engine.worker.sampler import SLICE, Float64s, pick, weigh
from engine.worker.slots import Int64s, StepBatch
from engine.worker.threads import places


class Network(Protocol):
    """One rank's model and KV cache; a step's tokens are chosen from it before the next step runs."""

    def forward(self, batch: StepBatch) -> None:
        """Compute a step's tokens, up to where those that sample are known."""
        ...

    def logits(self, which: Int64s) -> Tensor:
        """Of some of `batch.logits_at`, [len(which), vocabulary]."""
        ...

    def choose(self, temperatures: NDArray[np.float32], numbers: Float64s) -> Int64s:
        """A token for each of `batch.sampled_at`: greedy at a temperature of 0, else drawn by a number in [0, 1)."""
        ...

    def add_adapter(self, slot: int, adapter: Adapter) -> None:
        """Take an adapter, of this rank, into a free slot; raises ModelError if it doesn't fit the model."""
        ...

    def drop_adapter(self, slot: int) -> None:
        """Forget an adapter; no row has it any more."""
        ...


class GenericNetwork:
    """Transformers' own class; the reference, and the path of every model without a stack of its own."""

    def __init__(self, model: nn.Module, cache: KVCache, vocabulary: Slice | None):
        self._model = model
        self._cache = cache
        self._vocabulary = vocabulary
        self._adapters = HookedAdapters(model)
        self._workspace = Workspace(cache.layout.dtype)
        self._logits: Tensor | None = None

    def forward(self, batch: StepBatch) -> None:
        self._logits = None
        self._adapters.begin(batch.adapter_slots, batch.row_of)
        ragged = Ragged(batch.starts, batch.counts, batch.num_computed_tokens, batch.tables)
        forward = Forward.of(self._cache, ragged, batch.row_of, batch.positions, self._workspace)
        arguments: dict[str, Any] = {
            "input_ids": torch.from_numpy(batch.ids)[None],
            "position_ids": torch.from_numpy(batch.positions)[None],
            "use_cache": False,
        }
        logits_at = batch.logits_at
        if not len(logits_at):
            adapt.run(self._model.base_model, forward, arguments)  # type: ignore[arg-type]
            return
        arguments["logits_to_keep"] = torch.from_numpy(logits_at)
        self._logits = adapt.run(self._model, forward, arguments).logits[0]

    def add_adapter(self, slot: int, adapter: Adapter) -> None:
        self._adapters.add(slot, adapter)

    def drop_adapter(self, slot: int) -> None:
        self._adapters.drop(slot)

    def logits(self, which: Int64s) -> Tensor:
        assert self._logits is not None
        some = self._logits if len(which) == len(self._logits) else self._logits[torch.from_numpy(which)]
        return some if self._vocabulary is None else self._vocabulary.gather(some)

    def choose(self, temperatures: NDArray[np.float32], numbers: Float64s) -> Int64s:
        if self._vocabulary is not None:
            draw = functools.partial(self._draw, temperatures)
            return self._vocabulary.choose(self._best(temperatures), temperatures, numbers, draw)
        tokens = self._best(temperatures)[1]
        drawn = np.flatnonzero(temperatures)
        tokens[drawn] = self._draw(temperatures, drawn, numbers[drawn])
        return tokens

    def _best(self, temperatures: NDArray[np.float32]) -> tuple[NDArray[np.float32], Int64s, NDArray[np.float32]]:
        """Of each row the highest logit, its token, and what all weigh against it where the row draws."""
        assert self._logits is not None
        rows = len(temperatures)
        tokens, tops, weights = np.empty(rows, np.int64), np.empty(rows, np.float32), np.zeros(rows, np.float32)
        for start in range(0, rows, SLICE):
            some = slice(start, start + SLICE)
            part = self._logits[:rows][some].float()
            # numpy's argmax is several times as fast as torch's on one row after the other.
            tokens[some] = part.numpy().argmax(-1)
            tops[some] = np.take_along_axis(part.numpy(), tokens[some, None], 1)[:, 0]
            drawn = np.flatnonzero(temperatures[some]) if self._vocabulary is not None else np.zeros(0, np.int64)
            if len(drawn):
                weights[some][drawn] = weigh(part[torch.from_numpy(drawn)], temperatures[some][drawn]).sum(-1).numpy()
        return tops, tokens, weights

    def _draw(self, temperatures: NDArray[np.float32], rows: Int64s, numbers: Float64s) -> Int64s:
        """A token for each of some rows, by a number in [0, 1); where ranks divide the vocabulary, of this one's."""
        assert self._logits is not None
        tokens = np.empty(len(rows), dtype=np.int64)
        for start in range(0, len(rows), SLICE):
            some = slice(start, start + SLICE)
            part = self._logits[torch.from_numpy(rows[some])].float()
            tokens[some] = pick(weigh(part, temperatures[rows[some]]), numbers[some])
        return tokens


class FusedNetwork:
    """The fused stack; of one rank, or of several that sum up after each attention and MLP."""

    def __init__(self, stack: Stack, spec: Spec, model: nn.Module, vocabulary: Slice | None, pages: PageSupply):
        self.stack = stack
        self._spec = spec
        self._model = model  # its shapes: the stack has its numbers
        self._adapters: dict[int, PackedAdapter] = {}  # by slot
        self._count = spec.vocabulary
        self._vocabulary = vocabulary
        self._pages = pages
        weakref.finalize(self, pages.close)

    def forward(self, batch: StepBatch) -> None:
        columns = (
            batch.starts, batch.counts, batch.num_computed_tokens, batch.tables, batch.ids, batch.positions,
            batch.row_of, batch.logits_at,
        )  # fmt: skip
        self._pages.reach(int(batch.tables.max()))
        stack = self.stack
        stack.begin(Batch.of(*columns), *self._adapters_of(batch))
        if self._vocabulary is None:
            stack.run(0, stack.parts)
            return
        stack.run(0, 0)
        for part in range(1, stack.parts + 1):
            self._vocabulary.group.all_reduce(torch.from_numpy(stack.partial()))
            stack.run(part, part)

    def _adapters_of(self, batch: StepBatch) -> tuple[list[PackedAdapter], NDArray[np.int32] | None]:
        """The adapters that the batch's rows have, and for each token its number among them, or -1."""
        if batch.adapter_slots is None:
            return [], None
        used, number = np.unique(batch.adapter_slots, return_inverse=True)
        numbers = number - (used[0] < 0)
        return [self._adapters[slot] for slot in used[used >= 0].tolist()], numbers[batch.row_of].astype(np.int32)

    def add_adapter(self, slot: int, adapter: Adapter) -> None:
        check_adapter(adapter, self._model)
        self._adapters[slot] = pack_adapter(by_layer(adapter, self._spec.layers), self._spec)

    def drop_adapter(self, slot: int) -> None:
        self._adapters.pop(slot, None)

    def logits(self, which: Int64s) -> Tensor:
        out = torch.empty(len(which), self._count)
        self.stack.logits(which.astype(np.int32), out.numpy())
        return out if self._vocabulary is None else self._vocabulary.gather(out)

    def choose(self, temperatures: NDArray[np.float32], numbers: Float64s) -> Int64s:
        if self._vocabulary is None:
            return self.stack.choose(temperatures, numbers).astype(np.int64)

        def draw(rows: Int64s, inner: Float64s) -> NDArray[np.int32]:
            each = np.zeros(len(numbers))
            each[rows] = inner
            return self.stack.draw(each)[rows]

        return self._vocabulary.choose(self.stack.best(temperatures), temperatures, numbers, draw)


@dataclass(frozen=True, slots=True)
class Built:
    """A network, what computes it in words, and what the user should know of that."""

    network: Network
    kernels: str
    warnings: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()  # where the threads of the rank stay, this one on the first


def build_network(config: EngineConfig, facts: ModelFacts, resolved: ResolvedConfig, blank: Blank) -> Built:
    """Choose kernels by --kernels, the machine and the model, and give it its weights in the form they need.

    `facts` are the rank's. Raises ConfigError for kernels that this machine can't run.
    """
    levels, why = _levels(config)
    refused = False
    form = Form(facts.dtype, config.quantization or facts.dtype, config.kv_cache_dtype or facts.dtype)
    if levels:
        refusal = fused.refusal(blank.model, form, resolved.block_size)
        refused = refusal is not None
        level, why = (None, refusal) if refused else _first_built(config, levels)
        if level is not None:
            blocks = resolved.num_blocks, resolved.block_size
            part = blank.vocabulary
            first = 0 if part is None else part.first
            spec, kept = fused.make_spec(
                blank.model,
                form,
                *blocks,
                facts.kv_groups,
                partial=part is not None,
                first_token=first,
                fill=blank.fill,
            )
            threads = threads_per_rank(config.total_ranks)
            rank = config.first_rank + (0 if part is None else part.group.rank)
            cores = places(threads, rank, config.total_ranks)
            stack = Stack(spec, form.weights, form.cache, threads, level, kept, cores)
            keys, values = spec.layer[0].keys, spec.layer[0].values
            pages = PageSupply(
                kept, keys, 2 * facts.kv_groups.slots, values - keys, (values - keys) // resolved.num_blocks
            )
            network = FusedNetwork(stack, spec, blank.model, part, pages)
            return Built(network, f"{level}, fused stack", cores=cores)
    for flag, value in (("--quantization", config.quantization), ("--kv-cache-dtype", config.kv_cache_dtype)):
        if value is not None:
            raise ConfigError(f"{flag} {value} needs the CPU's own kernels: {why}")
    model = complete(blank, config, facts)
    cache = KVCache(facts.kv_groups, resolved.num_blocks, layout_of(facts, resolved.block_size))
    slow = config.kernels == "auto" and not refused
    warnings = (f"{why}: torch computes the model, several times as slowly",) if slow else ()
    return Built(GenericNetwork(model, cache, blank.vocabulary), f"torch ({why})", warnings)


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
