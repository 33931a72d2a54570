"""The generic backend of asynchronous devices for models that take multimodal inputs: see `mm_generic_backend`."""

from typing import Any

from torch import Tensor, nn

from engine.multimodal.families import MMFamily
from engine.worker.device import Columns, Device
from engine.worker.device_attention import Attention
from engine.worker.device_inputs import DeviceEmbeddings, plan_embeddings, planned_embeddings
from engine.worker.device_logits import DeviceLogits
from engine.worker.generic_device_backend import GenericDeviceBackend
from engine.worker.slots import StepBatch
from engine.worker.step_inputs import StepInputs


class MMGenericDeviceBackend(GenericDeviceBackend):
    """As `GenericDeviceBackend`.

    Args:
        decoder: an `engine.model.composed_decoder.ComposedDecoder`, on the device.
        family: of the model.
    """

    def __init__(
        self, device: Device, decoder: nn.Module, attention: Attention, logits: DeviceLogits, family: MMFamily
    ):
        super().__init__(device, decoder, attention, logits)
        self._embed: nn.Module = decoder.get_input_embeddings()  # type: ignore[operator]
        self._adds = family.added
        self._embeddings: DeviceEmbeddings | None = None  # of the step that is computed
        if family.deepstack:
            layers: Any = decoder.base_model.layers  # type: ignore[union-attr]
            for i, layer in enumerate(layers):
                layer.register_forward_hook(lambda _layer, _inputs, output, i=i: self._deepstack(i, output))

    def plan(self, batch: StepBatch) -> Columns:
        return {**super().plan(batch), **plan_embeddings(batch)}

    def _arguments(self, inputs: StepInputs) -> dict[str, Any]:
        self._embeddings = planned_embeddings(inputs)
        rotary = inputs.rotary.long()
        return {
            "inputs_embeds": self._embedded(inputs.ids.long(), self._embeddings)[None],
            "position_ids": rotary[None] if rotary.ndim == 1 else rotary[:, None],
            "use_cache": False,
        }

    def _embedded(self, ids: Tensor, embeddings: DeviceEmbeddings | None) -> Tensor:
        """Embeddings of a step's tokens: [tokens, hidden]."""
        if embeddings is None:
            found: Tensor = self._embed(ids)
        elif self._adds:
            found = self._embed(ids)
            found = found.index_add(0, embeddings.at, embeddings.embeddings.to(found.dtype))
        else:
            found = self._embed(embeddings.without_inputs(ids))
            found = found.index_copy(0, embeddings.at, embeddings.embeddings.to(found.dtype))
        return found

    def _deepstack(self, layer: int, output: Tensor) -> Tensor:
        """Add the features of a layer to its output, [1, tokens, hidden]."""
        embeddings = self._embeddings
        if embeddings is None or layer >= len(embeddings.deepstack):
            return output
        return output.index_add(1, embeddings.at, embeddings.deepstack[layer][None].to(output.dtype))
