"""Captured steps (CUDA graphs): the host enqueues a whole step at once, where launching each kernel takes longer.

A captured step does the same work on the same addresses at each replay. So steps are padded to a few sizes (see
`engine.worker.step_sizes`), their arrays have fixed places in the device's buffer, and what depends on the batch is
read from there: the work lists of attention, the places in the KV cache, the slots. The forward pass and the choice of
tokens are captured apart, since a request may sample on the host in between:

    forward   changes of the slots, ids of tokens that only the device has, model, logits         by size
    choice    tokens from the logits, newest tokens of the slots            by rows, with and without filters

Steps are captured while requests are served, one size at a time, the largest first, since all share one pool of memory
(see `engine.worker.graph_capture`). A step whose size isn't captured runs as before, and so do those that are
never captured: with draft tokens, prompt logprobs or adapters, or larger than all sizes.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.errors import cause_of
from engine.grammar import RowMasks
from engine.kernels.sampling import Draws
from engine.worker.device import Device
from engine.worker.device_steps import EagerSteps, Pad
from engine.worker.slots import StepBatch
from engine.worker.step_inputs import StepInputs
from engine.worker.step_sizes import StepSize, StepSizes

log = logging.getLogger("redline.worker")


_ChoiceKey = tuple[int, int, bool]  # address of the slots, rows, whether any row has filters


@dataclass(frozen=True, slots=True)
class _Forward:
    replay: Callable[[], None]
    address: int  # of the ids that it reads


@dataclass(frozen=True, slots=True)
class _Choice:
    replay: Callable[[], None]
    tokens: Tensor  # that it writes, int32[rows]


class StepGraphs:
    """Implements `engine.worker.device_steps.DeviceSteps`.

    Args:
        device: that captures.
        eager: for steps that aren't captured; its backend plans all steps.
        agree: the smallest of the numbers with which all ranks call it.
    """

    def __init__(
        self, device: Device, eager: EagerSteps, sizes: StepSizes, pad: Pad, agree: Callable[[int], int] = int
    ):
        self._device = device
        self._eager = eager
        self._sizes = sizes
        self._pad = pad
        self._agree = agree
        self._forwards: dict[StepSize, _Forward] = {}
        self._choices: dict[_ChoiceKey, _Choice] = {}
        self._left = sizes.in_capture_order

    def forward(self, batch: StepBatch) -> StepInputs:
        backend = self._eager.backend
        planned = backend.plan(batch)
        size = self._sizes.find(batch)
        captured = None if size is None else self._forwards.get(size)
        padded = None if size is None or captured is None else self._pad(planned, size)
        if size is None or captured is None or padded is None:
            return self._eager.forward_planned(batch, planned)
        inputs = self._eager.stager.put(batch, padded, size)
        if inputs.ids.data_ptr() != captured.address:
            raise RuntimeError("the arrays of a step are not where the captured step reads them")
        captured.replay()
        backend.resume(size.rows)
        return inputs

    def exclude(self, masks: RowMasks) -> None:
        """Launched, between the two captured parts of a step: how many rows have masks varies."""
        self._eager.exclude(masks)

    def choose(self, inputs: StepInputs) -> Tensor:
        captured = None if inputs.size is None else self._choices.get(_choice_key(inputs))
        if captured is None:
            return self._eager.choose(inputs)
        captured.replay()
        return captured.tokens[: inputs.num_sampled]

    @property
    def num_left(self) -> int:
        return len(self._left)

    def capture_next(self) -> None:
        if self._left:
            size = self._left.pop(0)
            try:
                self.capture(size)
                if not self._left:
                    log.info("all %d sizes of steps are captured", self.captured)
            except torch.OutOfMemoryError as error:
                self._give_up(f"there is no memory for more CUDA graphs: {cause_of(error)}")
            except Exception as error:  # whatever a model does that can't be captured, its steps can run
                self._give_up(f"steps can't be captured: {cause_of(error)}")

    def capture(self, size: StepSize) -> None:
        """Capture a step of padding. Raises what the device or the model raises if it can't be captured.

        If one rank can't, all raise: a padded step exchanges other shapes with the ranks than a launched one.
        """
        eager = self._eager
        inputs = eager.put_padding(size, self._pad)
        replay = self._record(lambda: eager.enqueue_forward(inputs))
        eager.backend.resume(size.rows)
        for filtered in (False, True):
            self._capture_choice(replace(inputs, draws=Draws(True, filtered)))
        self._forwards[size] = _Forward(replay, inputs.ids.data_ptr())

    def _capture_choice(self, inputs: StepInputs) -> None:
        key, chosen = _choice_key(inputs), list[Tensor]()
        if key not in self._choices:
            replay = self._record(lambda: chosen.append(self._eager.enqueue_choice(inputs)))
            self._choices[key] = _Choice(replay, chosen[-1])

    def _record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Capture work on all ranks. Each waits for the others, which exchange what is launched before a capture."""
        try:
            replay = self._device.capture(run)
        except BaseException:
            self._agree(0)
            raise
        if not self._agree(1):
            raise RuntimeError("another rank can't capture them")
        return replay

    def _give_up(self, reason: str) -> None:
        self._left = []
        self._device.release_memory()
        log.warning("%d sizes of steps are captured, others are launched kernel by kernel: %s", self.captured, reason)

    @property
    def captured(self) -> int:
        """How many sizes are captured."""
        return len(self._forwards)


def _choice_key(inputs: StepInputs) -> _ChoiceKey:
    return inputs.sample_slots.data_ptr(), len(inputs.sample_slots), inputs.draws.any_filtered
