"""Slots whose newest tokens are only on the device, and what changes there."""

import numpy as np
import torch

from engine.columns import column
from engine.kernels.sampling import pack_parameters
from engine.messages import Sampling, SlotAssignment, StepMessage
from engine.worker.device import Device
from engine.worker.device_slots import DeviceSlots
from engine.worker.step_inputs import DeviceState, InputStager, StepKernels
from engine.worker.torch_device import TorchDevice

PROMPT = [4, 5, 6]


def assignment(slot: int, generation: int, blocks: list[list[int]], sampling: Sampling | None = None) -> SlotAssignment:
    tables = tuple(column(table) for table in blocks)
    return SlotAssignment(slot, generation, column(PROMPT), 3, 0, tables, sampling or Sampling())


def test_a_token_is_counted_before_it_is_known() -> None:
    slots = DeviceSlots(2, 32, 4)
    slots.begin_step(StepMessage(0, assigned_slots=(assignment(1, 1, [[7]]),), chunks=column([[1, 3]])))
    appended = slots.extend(np.array([1]))
    batch = slots.begin_step(StepMessage(1))
    assert (batch.ids.tolist(), batch.positions.tolist(), batch.sampling.tolist()) == ([-1], [3], [1])
    slots.fill(appended, np.array([9], dtype=np.int32))
    assert slots.known_tokens(1).tolist() == [*PROMPT, 9]


def test_a_late_token_of_an_earlier_request_is_dropped() -> None:
    slots = DeviceSlots(1, 32, 4)
    slots.begin_step(StepMessage(0, assigned_slots=(assignment(0, 1, [[7]]),), chunks=column([[0, 3]])))
    first = slots.extend(np.array([0]))
    slots.begin_step(
        StepMessage(1, freed_slots=column([0]), assigned_slots=(assignment(0, 2, [[8]]),), chunks=column([[0, 3]]))
    )
    second = slots.extend(np.array([0]))
    slots.fill(first, np.array([9], dtype=np.int32))
    assert slots.known_tokens(0).tolist() == [*PROMPT, -1]
    slots.fill(second, np.array([10], dtype=np.int32))
    assert slots.known_tokens(0).tolist() == [*PROMPT, 10]


def test_rows_that_sample_on_the_host() -> None:
    slots = DeviceSlots(4, 32, 4)
    kinds = [
        Sampling(temperature=1.0, top_k=3, top_p=0.5, min_p=0.1),
        Sampling(logprobs=0),
        Sampling(presence_penalty=1.0),
        Sampling(top_k=3),
    ]
    rows = tuple(assignment(i, 1, [[i + 1]], kind) for i, kind in enumerate(kinds))
    slots.begin_step(StepMessage(0, assigned_slots=rows, chunks=column([[i, 3] for i in range(4)])))
    assert slots.needs_logits.tolist() == [False, True, True, False]
    assert slots.is_filtered.tolist() == [True, False, False, False]


def test_the_device_has_the_slots_tables_and_parameters() -> None:
    device: Device = TorchDevice("cpu")
    slots = DeviceSlots(3, 32, 4, num_groups=2)
    state = DeviceState(device, slots.layout)
    stager = InputStager(device, slots, state, StepKernels())
    sampling = Sampling(temperature=0.5, top_p=0.9, min_p=0.25, top_k=2**40, seed=2**64 - 2)
    steps = [
        StepMessage(0, assigned_slots=(assignment(2, 1, [[7], [8, 9]], sampling),), chunks=column([[2, 0]])),
        StepMessage(1, new_blocks=column([[2, 0, 3], [2, 1, 4], [2, 0, 5]]), chunks=column([[2, 3]])),
        # Twice in one step: the later value counts.
        StepMessage(2, assigned_slots=(assignment(0, 1, [[1], [2]]),), chunks=column([[0, 0], [2, 0]])),
        StepMessage(
            3, freed_slots=column([0]), assigned_slots=(assignment(0, 2, [[6], [5]]),), chunks=column([[0, 2]])
        ),
    ]
    for message in steps:
        batch = slots.begin_step(message)
        if len(batch.slots):
            stager.prepare(stager.put(batch, {}))
        if message.step == 1:
            slots.append_tokens(np.array([2]), np.array([11]))
    assert np.array_equal(state.tables.numpy(), slots.block_tables)
    assert slots.block_tables[0, 2, :3].tolist() == [7, 3, 5]
    assert slots.block_tables[:, 0, 0].tolist() == [6, 5]
    assert np.array_equal(state.parameters[2].numpy(), pack_parameters(sampling))
    assert state.parameters[2, 4:6].view(torch.int64).tolist() == [-2]
    assert state.parameters[2, 6:8].view(torch.float64).tolist() == [0.9]
