"""The generic model backend of asynchronous devices: transformers' own class with an injected attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from engine.arrays import Int64s
from engine.model.lora.lora_hooks import LoraHooks, tokens_by_adapter
from engine.model.lora.lora_weights import Adapter
from engine.model.runtime import attention_interface
from engine.model.runtime.vocab_shard import VocabShard
from engine.worker.device import Columns, Device
from engine.worker.device_attention import Attention
from engine.worker.kept_logits import KeptLogits
from engine.worker.slots import StepBatch
from engine.worker.step_inputs import StepInputs, StepKernels


class GenericDeviceBackend:
    """Implements `engine.worker.device_backend.DeviceBackend`; `model` and the attention's cache are on the device.

    `parameters`: int32[slots, 8], how tokens are sampled, see `engine.kernels.sampling`; `rows`: most whose logits a
    captured step keeps.
    """

    def __init__(
        self,
        device: Device,
        model: nn.Module,
        attention: Attention,
        kernels: StepKernels,
        parameters: Tensor,
        vocabulary: VocabShard | None,
        rows: int,
    ):
        self._device = device
        self._model = model
        self._attention = attention
        self._kernels = kernels
        self._parameters = parameters
        self._vocabulary = vocabulary
        self._adapters = LoraHooks(model, device.place)
        self._kept = KeptLogits(rows)
        self._logits: Tensor | None = None

    def plan(self, batch: StepBatch) -> Columns:
        adapters = tokens_by_adapter(batch.adapter_slots, batch.row_of)
        return {**self._attention.plan(batch), **{f"adapter.{slot}": tokens for slot, tokens in adapters}}

    def forward(self, inputs: StepInputs) -> None:
        self._logits = None
        self._attention.begin(inputs)
        self._adapters.begin_with(
            [
                (int(name.removeprefix("adapter.")), tokens)
                for name, tokens in inputs.planned.items()
                if name.startswith("adapter.")
            ]
        )
        arguments: dict[str, Any] = {
            "input_ids": inputs.ids.long()[None],
            "position_ids": inputs.positions.long()[None],
            "use_cache": False,
        }
        if not len(inputs.logits_at):
            attention_interface.run_model(self._model.base_model, self._attention, arguments)  # type: ignore[arg-type]
            return
        arguments["logits_to_keep"] = inputs.logits_at
        logits = attention_interface.run_model(self._model, self._attention, arguments).logits[0]
        self._logits = self._kept.keep(logits)

    def choose(self, inputs: StepInputs) -> Tensor:
        assert self._logits is not None
        logits = self._logits[: len(inputs.sample_slots)]
        return self._kernels.choose_tokens(
            logits, self._parameters, inputs.sample_slots, inputs.sample_counts, inputs.draws
        )

    def resume(self, rows: int) -> None:
        self._logits = self._kept.of(rows)

    def logits(self, which: Int64s) -> Tensor:
        assert self._logits is not None
        if len(which) == len(self._logits):
            return self._gathered(self._logits)
        return self._gathered(self._logits[self._device.place(torch.from_numpy(which))])

    def _gathered(self, logits: Tensor) -> Tensor:
        return logits if self._vocabulary is None else self._vocabulary.gather(logits)

    def add_adapter(self, slot: int, adapter: Adapter) -> None:
        self._adapters.add(slot, adapter)

    def drop_adapter(self, slot: int) -> None:
        self._adapters.drop(slot)


def move_buffers(model: nn.Module, place: Callable[[Tensor], Tensor]) -> None:
    """Replace all buffers of a model by copies that `place` makes; shared ones stay shared."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for name, tensor in module._buffers.items():
            if tensor is None:
                continue
            if id(tensor) not in moved:
                moved[id(tensor)] = place(tensor)
            module._buffers[name] = moved[id(tensor)]
