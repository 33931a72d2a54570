"""The generic model backend of asynchronous devices: transformers' own class with an injected attention."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from engine.arrays import Int64s
from engine.grammar import RowMasks
from engine.model.lora.lora_hooks import LoraHooks
from engine.model.lora.lora_weights import Adapter
from engine.model.runtime import attention_interface
from engine.worker.device import Columns, Device
from engine.worker.device_adapters import plan_adapters, planned_adapters
from engine.worker.device_attention import Attention
from engine.worker.device_logits import DeviceLogits
from engine.worker.slots import StepBatch
from engine.worker.step_inputs import StepInputs


class GenericDeviceBackend:
    """Implements `engine.worker.device_backend.DeviceBackend`; `model` and the attention's cache are on the device."""

    def __init__(self, device: Device, model: nn.Module, attention: Attention, logits: DeviceLogits):
        self._model = model
        self._attention = attention
        self._adapters = LoraHooks(model, device.place)
        self._logits = logits

    def plan(self, batch: StepBatch) -> Columns:
        return {**self._attention.plan(batch), **plan_adapters(batch)}

    def forward(self, inputs: StepInputs) -> None:
        self._logits.clear()
        self._attention.begin(inputs)
        self._adapters.begin_with(planned_adapters(inputs.planned))
        arguments = self._arguments(inputs)
        if not len(inputs.logits_at):
            attention_interface.run_model(self._model.base_model, self._attention, arguments)  # type: ignore[arg-type]
            return
        arguments["logits_to_keep"] = inputs.logits_at
        self._logits.keep(attention_interface.run_model(self._model, self._attention, arguments).logits[0])

    def _arguments(self, inputs: StepInputs) -> dict[str, Any]:
        """What the model gets, but for `logits_to_keep`."""
        return {
            "input_ids": inputs.ids.long()[None],
            "position_ids": inputs.positions.long()[None],
            "use_cache": False,
        }

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
