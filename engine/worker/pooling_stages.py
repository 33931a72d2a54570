"""Runs steps of a model that pools on a rank of a pipeline stage: hidden states go forward, and nothing comes back."""

from engine.arrays import Float32s
from engine.config import EngineConfig
from engine.messages import StepMessage
from engine.model.loading.meta_model import MetaModel
from engine.model.model_info import ModelInfo
from engine.resolved_config import ResolvedConfig
from engine.worker.backend_builder import BuiltBackend
from engine.worker.model_backend import ModelBackend
from engine.worker.pooling_backend import PoolingBackend
from engine.worker.pooling_runner import PoolingRunner, PoolingSlots, decoder_pooling, pooling_slots
from engine.worker.runner import build_parts
from engine.worker.slots import StepBatch
from engine.worker.stage_links import StageLinks
from engine.worker.step_runner import StepRunner


class PoolingStageRunner(StepRunner[None]):
    """A rank of a stage that does not pool."""

    def __init__(self, backend: ModelBackend, slots: PoolingSlots):
        super().__init__({})
        self._backend = backend
        self._slots = slots

    def _advance(self, message: StepMessage) -> tuple[StepBatch, None]:
        batch = self._slots.begin_step(message)
        if len(batch.slots):
            self._backend.forward(batch)
        return batch, None

    def sample(self, step: int, masks: bytes = b"") -> bytes:
        """End a step. Returns nothing: the last stage has the vectors."""
        assert not masks, "a model that pools samples no tokens"
        self._take(step)
        return b""


class LastPoolingRunner(PoolingRunner):
    """The rank of the last stage."""

    def __init__(self, backend: PoolingBackend, slots: PoolingSlots, links: StageLinks):
        super().__init__(backend, slots)
        self._links = links

    def _advance(self, message: StepMessage) -> tuple[StepBatch, Float32s]:
        waited = self._links.waited_s
        found = super()._advance(message)
        self._seconds -= self._links.waited_s - waited  # the time of the device is without that of other stages
        return found


def build_pooling_stage(
    config: EngineConfig, model_info: ModelInfo, resolved: ResolvedConfig, meta_model: MetaModel, links: StageLinks
) -> tuple[PoolingStageRunner | PoolingRunner, BuiltBackend]:
    """Build the runner of a stage; `meta_model` has its layers."""
    slots = pooling_slots(resolved)
    built, _ = build_parts(config, model_info, resolved, meta_model, None, links)
    if links.stage.is_last:
        return LastPoolingRunner(decoder_pooling(config, model_info, built), slots, links), built
    return PoolingStageRunner(built.backend, slots), built
