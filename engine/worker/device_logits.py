"""The logits of the newest step, at a fixed address where captured steps write and read them, and tokens from them."""

import numpy as np
import torch
from torch import Tensor

from engine.arrays import Int64s
from engine.grammar import RowMasks
from engine.model.runtime.vocab_shard import VocabShard
from engine.worker.device import Device
from engine.worker.step_inputs import StepInputs, StepKernels


class DeviceLogits:
    """What all model backends of asynchronous devices do with their logits.

    Their memory is allocated once, by the first step that runs.

    Args:
        kernels: of which it uses those of logits.
        parameters: int32[slots, 8], how tokens are sampled, see `engine.kernels.sampling`.
        shard: of the vocabulary; None with one rank.
        rows: most of a captured step. A step with more (draft tokens, prompt logprobs) keeps its own tensor.
    """

    def __init__(self, device: Device, kernels: StepKernels, parameters: Tensor, shard: VocabShard | None, rows: int):
        self._device = device
        self._kernels = kernels
        self._parameters = parameters
        self._shard = shard
        self._rows = rows
        self._kept: Tensor | None = None
        self._newest: Tensor | None = None

    def clear(self) -> None:
        """Release those of the step before."""
        self._newest = None

    def keep(self, logits: Tensor) -> None:
        """Take the logits of a step: [n, tokens of this rank]."""
        if len(logits) > self._rows:
            self._newest = logits
            return
        if self._kept is None:
            self._kept = logits.new_empty(self._rows, logits.shape[1])
        self._newest = self._kept[: len(logits)]
        self._newest.copy_(logits)

    def resume(self, rows: int) -> None:
        """Use the logits that a captured step kept when it was replayed."""
        assert self._kept is not None
        self._newest = self._kept[:rows]

    def exclude(self, masks: RowMasks) -> None:
        """See `engine.worker.device_backend.DeviceBackend.exclude`."""
        assert self._newest is not None
        if self._shard is not None:
            masks = masks.of_tokens(self._shard.first, self._shard.count)
        words = masks.reaching(self._newest.shape[1])
        placed = self._device.put_masks({"rows": masks.at.astype(np.int32), "words": words})
        self._kernels.exclude_tokens(self._newest, placed["rows"], placed["words"])

    def choose(self, inputs: StepInputs) -> Tensor:
        """See `engine.worker.device_backend.DeviceBackend.choose`."""
        assert self._newest is not None
        logits = self._newest[: len(inputs.sample_slots)]
        return self._kernels.choose_tokens(
            logits, self._parameters, inputs.sample_slots, inputs.sample_counts, inputs.draws
        )

    def of(self, which: Int64s) -> Tensor:
        """See `engine.worker.device_backend.DeviceBackend.logits`."""
        logits = self._newest
        assert logits is not None
        if len(which) != len(logits):
            logits = logits[self._device.place(torch.from_numpy(which))]
        return logits if self._shard is None else self._shard.gather(logits)
