"""Embeddings of multimodal inputs in the steps of a device.

The embeddings are on the device; where they belong travels with the step's other arrays. Steps with such tokens are
never padded, since these arrays are none that a captured step reads: they are launched kernel by kernel. Later steps of
the same requests are captured ones.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from engine.worker.device import Columns
from engine.worker.slots import StepBatch
from engine.worker.step_inputs import StepInputs

AT, SOURCES = "mm.at", "mm.sources"


@dataclass(frozen=True, slots=True)
class DeviceEmbeddings:
    """The tokens of a step with embeddings of inputs.

    at: int64[n], their indices. sources: int32[tokens], the row of `embeddings` of each token, -1 for others.
    embeddings: [n, hidden]. deepstack: [layers, n, hidden], added after the first layers; may have no layers.
    """

    at: Tensor
    sources: Tensor
    embeddings: Tensor
    deepstack: tuple[Tensor, ...]

    def without_inputs(self, ids: Tensor) -> Tensor:
        """Token ids with 0 in place of an input: some checkpoints have no embedding for such a token."""
        return ids.index_fill(0, self.at, 0)


def plan_embeddings(batch: StepBatch) -> Columns:
    """Where a step has embeddings; nothing if it has none."""
    if batch.mm is None:
        return {}
    sources = np.full(len(batch.ids), -1, dtype=np.int32)
    sources[batch.mm.at] = np.arange(len(batch.mm.at))
    return {AT: batch.mm.at, SOURCES: sources}


def planned_embeddings(inputs: StepInputs) -> DeviceEmbeddings | None:
    """The embeddings of a step whose arrays of `plan_embeddings` are on the device."""
    mm = inputs.batch.mm
    if mm is None:
        return None
    deepstack = () if mm.deepstack is None else tuple(mm.deepstack.unbind())
    return DeviceEmbeddings(inputs.planned[AT], inputs.planned[SOURCES], mm.embeddings, deepstack)
