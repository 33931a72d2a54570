"""The fused device backend: a decoder stack of Triton kernels and matrix products of torch.

A layer of `engine.worker.triton_stack`, with the tokens of all rows of the batch side by side:

    rms_norm           residual (float32) += output of the last MLP; normalized
    product            queries, keys and values
    rotate_and_cache   norms of heads, rotary embedding, write to the KV cache
    paged_attention
    product            output; summed over ranks
    rms_norm           residual += output of the attention; normalized
    product            gate and up
    silu_mul
    product            down; summed over ranks
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from engine.arrays import Int64s
from engine.grammar import RowMasks
from engine.kernels.attention import Scores
from engine.kernels.triton.activation import silu_mul
from engine.kernels.triton.mm_embeddings import merge_embeddings
from engine.kernels.triton.norm import rms_norm
from engine.kernels.triton.rotary import rotate_and_cache
from engine.model.lora.lora_packing import by_layer, merge
from engine.model.lora.lora_weights import Adapter, LowRank, check_adapter
from engine.worker.device import Columns, Device
from engine.worker.device_adapters import plan_adapters, planned_adapters
from engine.worker.device_inputs import DeviceEmbeddings, plan_embeddings, planned_embeddings
from engine.worker.device_logits import DeviceLogits
from engine.worker.slots import StepBatch
from engine.worker.stack_ranks import StackRanks
from engine.worker.step_inputs import StepInputs
from engine.worker.triton_backend import TritonAttention
from engine.worker.triton_stack import StackLayer, StackLinear, TritonStack


class TritonStackBackend:
    """Implements `engine.worker.device_backend.DeviceBackend`.

    Args:
        attention: over the KV cache of the stack's layers.
        model: for its shapes; the stack has its weights.
        ranks: what ranks exchange.
        adds_inputs: embeddings of inputs are added to those of their tokens (Molmo), in place of which others are put.
    """

    def __init__(
        self,
        device: Device,
        stack: TritonStack,
        attention: TritonAttention,
        logits: DeviceLogits,
        model: nn.Module,
        ranks: StackRanks,
        *,
        adds_inputs: bool = False,
    ):
        self._adds_inputs = adds_inputs
        self._stack = stack
        self._ranks = ranks
        self._attention = attention
        self._adapters = StackAdapters(device, stack, model)
        self._logits = logits

    def plan(self, batch: StepBatch) -> Columns:
        return {**self._attention.plan(batch), **plan_adapters(batch), **plan_embeddings(batch)}

    def forward(self, inputs: StepInputs) -> None:
        self._logits.clear()
        self._attention.begin(inputs)
        self._adapters.begin(inputs.planned)
        stack = self._stack
        embeddings = planned_embeddings(inputs)
        residual = self._embed(inputs.ids, embeddings)
        delta: Tensor | None = None
        layers = enumerate(stack.layers)  # taken by two loops
        if embeddings is not None:
            for features, (number, layer) in zip(embeddings.deepstack, layers, strict=False):
                delta = self._run_layer(number, layer, residual, delta, inputs.rotary)
                residual.index_add_(0, embeddings.at, features.float())
        for number, layer in layers:
            delta = self._run_layer(number, layer, residual, delta, inputs.rotary)
        if len(inputs.logits_at):
            at = inputs.logits_at
            last = self._normalize(residual[at], None if delta is None else delta[at], stack.final_norm)
            self._logits.keep(stack.head(last))

    def _embed(self, ids: Tensor, embeddings: DeviceEmbeddings | None) -> Tensor:
        """The first hidden states of a step's tokens, with those of inputs: float32[tokens, hidden]."""
        table = self._stack.embedding
        if embeddings is None:
            return self._ranks.embed(ids, table).float()
        if self._adds_inputs:
            found = self._ranks.embed(ids, table).float()
            return found.index_add_(0, embeddings.at, embeddings.embeddings.float())
        found = self._ranks.embed(embeddings.without_inputs(ids), table).float()
        merge_embeddings(found, embeddings.embeddings, embeddings.sources)
        return found

    def _run_layer(
        self, number: int, layer: StackLayer, residual: Tensor, delta: Tensor | None, rotary: Tensor
    ) -> Tensor:
        """Compute a layer; returns the output of its MLP, which the next norm adds to the residual."""
        attention, shape, linear = self._attention, self._attention.shape, self._adapters.linear
        qkv = linear(self._normalize(residual, delta, layer.input_norm), layer.qkv, number)
        cache, index = attention.place(number)
        rotate_and_cache(qkv, rotary, index, cache, shape, layer.rotary, layer.norms, self._stack.epsilon)
        heads = qkv.view(len(qkv), -1, shape.head_dim)
        mixed = qkv.new_empty(len(qkv), shape.heads, shape.head_dim)
        attention.attend_cached(number, heads[:, : shape.heads], mixed, layer.window, Scores(layer.scaling))
        delta = self._ranks.reduce(linear(mixed.view(len(qkv), -1), layer.output, number))
        gate_up = linear(self._normalize(residual, delta, layer.post_norm), layer.gate_up, number)
        inner = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        silu_mul(gate_up, inner)
        return self._ranks.reduce(linear(inner, layer.down, number))

    def _normalize(self, residual: Tensor, delta: Tensor | None, weight: Tensor) -> Tensor:
        out = torch.empty_like(residual, dtype=self._stack.embedding.dtype)
        rms_norm(residual, delta, weight, out, self._stack.epsilon)
        return out

    def exclude(self, masks: RowMasks) -> None:
        self._logits.exclude(masks)

    def choose(self, inputs: StepInputs) -> Tensor:
        return self._logits.choose(inputs)

    def resume(self, rows: int) -> None:
        self._logits.resume(rows)

    def logits(self, which: Int64s) -> Tensor:
        return self._logits.of(which)

    def add_adapter(self, slot: int, adapter: Adapter) -> None:
        self._adapters.add(slot, adapter)

    def drop_adapter(self, slot: int) -> None:
        self._adapters.drop(slot)


class StackAdapters:
    """The adapters of a stack, by slot; weights of linears that are computed as one are merged."""

    def __init__(self, device: Device, stack: TritonStack, model: nn.Module):
        self._device = device
        self._stack = stack
        self._model = model
        self._parts: dict[int, dict[tuple[int, str], LowRank]] = {}  # by slot; layer and name of the first linear
        self._tokens: list[tuple[int, Tensor]] = []  # of the step: slots, and indices of their tokens

    def add(self, slot: int, adapter: Adapter) -> None:
        """Put an adapter into a free slot. Raises ModelError if it does not fit the model."""
        check_adapter(adapter, self._model)
        dtype, place = self._stack.embedding.dtype, self._device.place
        parts = {}
        layers = by_layer(adapter, range(len(self._stack.layers)))
        for number, (layer, changes) in enumerate(zip(self._stack.layers, layers, strict=True)):
            for linear in layer.linears:
                merged = merge(changes, linear.outputs)
                if merged is not None:
                    low_rank = LowRank(place(merged.down.to(dtype)), place(merged.up.to(dtype)))
                    parts[number, next(iter(linear.outputs))] = low_rank
        self._parts[slot] = parts

    def drop(self, slot: int) -> None:
        self._parts.pop(slot, None)

    def begin(self, planned: Mapping[str, Tensor]) -> None:
        """Begin a step with the planned arrays of `TritonStackBackend.plan`."""
        self._tokens = planned_adapters(planned)

    def linear(self, x: Tensor, linear: StackLinear, layer: int) -> Tensor:
        """The output of a layer's linears, with those of the adapters in the batch: [tokens, outputs]."""
        output = linear.product(x)
        for slot, tokens in self._tokens:
            part = self._parts[slot].get((layer, next(iter(linear.outputs))))
            if part is not None:  # no token occurs twice
                output[tokens] += torch.mm(torch.mm(x[tokens], part.down.T), part.up.T)
        return output
