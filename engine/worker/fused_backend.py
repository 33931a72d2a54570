"""The fused model backend: one C++ call per step, or one per part where several ranks share the model."""

import weakref

import numpy as np
import torch
from torch import Tensor, nn

from engine.arrays import Float32s, Float64s, Int32s, Int64s
from engine.grammar import RowMasks
from engine.kernels.cpu.bindings import Batch, PackedAdapter, Stack, StackSpec
from engine.model.lora.lora_packing import by_layer, pack_adapter
from engine.model.lora.lora_weights import Adapter, check_adapter
from engine.model.runtime.vocab_shard import VocabShard
from engine.worker.mm_rows import MMRows
from engine.worker.page_supply import PageSupply
from engine.worker.slots import StepBatch


class FusedBackend:
    """The fused stack. Several ranks sum their partial results after each attention and MLP.

    Embeddings of multimodal inputs replace those of their tokens after the first part, on each rank after the sum.

    Args:
        adds_inputs: they are added instead (Molmo).
    """

    def __init__(
        self,
        stack: Stack,
        spec: StackSpec,
        model: nn.Module,
        vocabulary: VocabShard | None,
        pages: PageSupply,
        *,
        adds_inputs: bool = False,
    ):
        self.stack = stack
        self._spec = spec
        self._model = model  # for its shapes; the stack has its weights
        self._layers = range(spec.layers)  # their numbers in the whole model
        self._adapters: dict[int, PackedAdapter] = {}  # by slot
        self._vocabulary_size = spec.vocabulary
        self._vocabulary = vocabulary
        self._pages = pages
        self._adds_inputs = adds_inputs
        weakref.finalize(self, pages.close)

    def forward(self, batch: StepBatch) -> None:
        self._begin(batch)
        if self._vocabulary is None and batch.mm is None:
            self.stack.run(0, self.stack.last_part)
        else:
            self._run_parts(batch.mm, 0, self.stack.last_part - 1)
            self.stack.run(self.stack.last_part, self.stack.last_part)

    def hidden_states(self, batch: StepBatch, at: Int64s) -> Tensor:
        """Compute a step of one rank without logits.

        Returns the last hidden states, behind the final norm, at some of its tokens: float32 [len(at), hidden].
        """
        assert self._vocabulary is None, "ranks that divide a model don't return hidden states"
        self._begin(batch)
        self.stack.run(0, self.stack.last_part - 1)
        return self._normed(at)

    def _normed(self, at: Int64s) -> Tensor:
        """Hidden states of some tokens, behind the final norm, once all layers are computed."""
        hidden = torch.from_numpy(self.stack.hidden())[torch.from_numpy(at)]
        weight: Tensor = self._model.model.norm.weight  # type: ignore[union-attr, assignment]
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self._spec.epsilon) * weight.float()

    def _begin(self, batch: StepBatch) -> None:
        columns = (
            batch.starts, batch.counts, batch.num_computed_tokens, batch.tables, batch.ids, batch.positions,
            batch.row_of, batch.logits_at,
        )  # fmt: skip
        self._pages.reach(int(batch.tables.max()))
        self.stack.begin(Batch.of(*columns, rotary=batch.rotary_positions), *self._adapters_of(batch))

    def _run_parts(self, mm: MMRows | None, first: int, last: int) -> None:
        """Run parts before the head in pieces, after which ranks sum their partial results and inputs are put in."""
        stack, begin = self.stack, first
        stops = range(first, last + 1) if self._vocabulary is not None else _parts_with_inputs(mm)
        for stop in stops:
            stack.run(begin, stop)
            if self._vocabulary is not None:
                self._vocabulary.group.all_reduce(torch.from_numpy(stack.partial()))
            if mm is not None:
                self._put(mm, stop)
            begin = stop + 1
        if begin <= last:
            stack.run(begin, last)

    def _put(self, mm: MMRows, part: int) -> None:
        """Put in what belongs after a part: embeddings after the first one, deepstack features after layers."""
        at = torch.from_numpy(mm.at)
        if part == 0:
            embedded = self.stack.hidden() if self._vocabulary is None else self.stack.partial()
            put = torch.Tensor.index_add_ if self._adds_inputs else torch.Tensor.index_copy_
            put(torch.from_numpy(embedded), 0, at, mm.embeddings.float())
        elif mm.deepstack is not None and part in _parts_with_inputs(mm):
            torch.from_numpy(self.stack.hidden()).index_add_(0, at, mm.deepstack[part // 2 - 1].float())

    def _adapters_of(self, batch: StepBatch) -> tuple[list[PackedAdapter], Int32s | None]:
        """The adapters in the batch, and for each token the index of its adapter among them, or -1."""
        if batch.adapter_slots is None:
            return [], None
        used, number = np.unique(batch.adapter_slots, return_inverse=True)
        numbers = number - (used[0] < 0)
        return [self._adapters[slot] for slot in used[used >= 0].tolist()], numbers[batch.row_of].astype(np.int32)

    def add_adapter(self, slot: int, adapter: Adapter) -> None:
        check_adapter(adapter, self._model)
        self._adapters[slot] = pack_adapter(by_layer(adapter, self._layers), self._spec)

    def drop_adapter(self, slot: int) -> None:
        self._adapters.pop(slot, None)

    def logits(self, which: Int64s) -> Tensor:
        out = torch.empty(len(which), self._vocabulary_size)
        self.stack.logits(which.astype(np.int32), out.numpy())
        return out if self._vocabulary is None else self._vocabulary.gather(out)

    def choose(self, temperatures: Float32s, uniforms: Float64s, masks: RowMasks | None = None) -> Int64s:
        if self._vocabulary is None:
            return self.stack.choose(temperatures, uniforms, masks).astype(np.int64)
        own = masks and masks.of_tokens(self._vocabulary.first, self._vocabulary.count)

        def draw(samples: Int64s, inner: Float64s) -> Int32s:
            each = np.zeros(len(uniforms))
            each[samples] = inner
            return self.stack.draw(each)[samples]

        return self._vocabulary.choose(self.stack.greedy(temperatures, own), temperatures, uniforms, draw)


def _parts_with_inputs(mm: MMRows | None) -> list[int]:
    """The embedding, and the MLPs of the layers with deepstack features."""
    layers = 0 if mm is None or mm.deepstack is None else len(mm.deepstack)
    return list(range(0, 2 * layers + 1, 2))
