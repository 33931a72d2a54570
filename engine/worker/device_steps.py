"""How the steps of an asynchronous device are enqueued: the host launches each kernel, or replays captured steps."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from engine.errors import EngineDeadError
from engine.grammar import RowMasks
from engine.text import first_line, human_bytes
from engine.worker.device import Columns, Device
from engine.worker.device_backend import DeviceBackend
from engine.worker.slots import StepBatch
from engine.worker.step_inputs import DeviceState, InputStager, StepInputs, StepKernels
from engine.worker.step_sizes import StepSize

T = TypeVar("T")
Pad = Callable[[Columns, StepSize], Columns | None]  # pads what the backend plans; None: it can't be padded


class DeviceSteps(Protocol):
    """Enqueues steps; the tokens of a step are chosen before the next step."""

    @property
    def num_left(self) -> int:
        """How many steps are left to be captured."""
        ...

    def forward(self, batch: StepBatch) -> StepInputs:
        """Put a step on the device and enqueue the model."""
        ...

    def exclude(self, masks: RowMasks) -> None:
        """Enqueue the exclusion of tokens from the choice that follows, see `DeviceBackend.exclude`."""
        ...

    def choose(self, inputs: StepInputs) -> Tensor:
        """Enqueue the choice of the step's tokens, which become the newest of their slots: int32[n] on the device."""
        ...

    def capture_next(self) -> None:
        """Capture one of the steps that are left, between two steps."""
        ...


class EagerSteps:
    """Implements `DeviceSteps`: the host launches each kernel of each step.

    Args:
        repeats: whether a step that runs out of memory may be enqueued once more. Several ranks can't do that: they
            exchange tensors in the step.
        mrope: whether tokens have three rotary positions each.
    """

    num_left = 0

    def __init__(
        self,
        device: Device,
        backend: DeviceBackend,
        state: DeviceState,
        stager: InputStager,
        kernels: StepKernels,
        *,
        repeats: bool = True,
        mrope: bool = False,
    ):
        self._device = device
        self._repeats = repeats
        self._state = state
        self._kernels = kernels
        self._empty = _empty_batch(len(state.tables), mrope=mrope)
        self.backend = backend
        self.stager = stager

    def forward(self, batch: StepBatch) -> StepInputs:
        return self.forward_planned(batch, self.backend.plan(batch))

    def forward_planned(self, batch: StepBatch, planned: Columns) -> StepInputs:
        """`forward` of a step that the backend has planned."""
        inputs = self.stager.put(batch, planned)
        self._with_memory(lambda: self.enqueue_forward(inputs))
        return inputs

    def exclude(self, masks: RowMasks) -> None:
        self._with_memory(lambda: self.backend.exclude(masks))

    def choose(self, inputs: StepInputs) -> Tensor:
        return self._with_memory(lambda: self.enqueue_choice(inputs))[: inputs.num_sampled]

    def capture_next(self) -> None:
        """Nothing is left."""

    def put_padding(self, size: StepSize, pad: Pad) -> StepInputs:
        """A step of a size, all of which is padding, so that its runs change nothing.

        Raises RuntimeError if the backend's arrays have no fixed sizes.
        """
        padded = pad(self.backend.plan(self._empty), size)
        if padded is None:
            raise RuntimeError("the model's steps have arrays of no fixed size")
        return self.stager.put(self._empty, padded, size)

    def enqueue_forward(self, inputs: StepInputs) -> None:
        """Enqueue the changes of the slots and the model. May be repeated."""
        self.stager.prepare(inputs)
        self.backend.forward(inputs)

    def enqueue_choice(self, inputs: StepInputs) -> Tensor:
        """The choice with its padding. May be repeated.

        A slot that samples on the host gets a token as well: its next step has the host's.
        """
        tokens = self.backend.choose(inputs)
        self._kernels.append_tokens(self._state.last_token, inputs.sample_slots, tokens)
        return tokens

    def _with_memory(self, run: Callable[[], T]) -> T:
        """Call `run`; if the device has too little memory, return to it what isn't in use, and call it once more.

        Raises EngineDeadError if that does not help, or isn't allowed.
        """
        try:
            return run()
        except torch.OutOfMemoryError as error:
            if not self._repeats:
                raise EngineDeadError(_out_of_memory(self._device, error)) from error
            self._device.release_memory()
        try:
            return run()
        except torch.OutOfMemoryError as error:
            raise EngineDeadError(_out_of_memory(self._device, error)) from error


def _empty_batch(num_groups: int, *, mrope: bool) -> StepBatch:
    none = np.zeros(0, dtype=np.int64)
    tables = np.zeros((num_groups, 0, 0), dtype=np.int32)
    rotary = np.zeros((3, 0), dtype=np.int64) if mrope else None
    return StepBatch(
        0, none, none, none, none, tables, none, none, none, None, none, none, none, none, rotary_positions=rotary
    )


def _out_of_memory(device: Device, error: torch.OutOfMemoryError) -> str:
    memory = device.memory()
    figures = ""
    if memory is not None:
        total, free, peak = map(human_bytes, (memory.total_bytes, memory.free_bytes, memory.peak_bytes))
        figures = f": of {total}, {free} are free, and tensors took {peak} at most"
    return (
        f"a step needs more memory than the device has{figures} (lower --gpu-memory-utilization or "
        f"--max-num-batched-tokens): {first_line(error)}"
    )
