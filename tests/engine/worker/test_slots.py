"""What a worker makes of step messages."""

import numpy as np
import pytest

from engine.columns import column
from engine.messages import Sampling, SlotAssignment, StepMessage
from engine.worker.slots import WorkerSlots


def added(row: int, tokens: list[int], *, generation: int = 1, computed: int = 0, blocks: list[int]) -> SlotAssignment:
    return SlotAssignment(row, generation, column(tokens), len(tokens), computed, (column(blocks),), Sampling())


def make_slots() -> WorkerSlots:
    return WorkerSlots(4, 32, 4)


def test_a_ragged_step_is_laid_out_by_ascending_rows() -> None:
    slots = make_slots()
    message = StepMessage(
        0,
        assigned_slots=(
            added(2, [20, 21, 22], blocks=[7]),
            added(0, [10, 11, 12, 13, 14, 15], computed=4, blocks=[3, 5]),
        ),
        chunks=column([[2, 2], [0, 2]]),
    )
    batch = slots.begin_step(message)
    assert batch.slots.tolist() == [0, 2]
    assert batch.ids.tolist() == [14, 15, 20, 21]
    assert batch.positions.tolist() == [4, 5, 0, 1]
    assert batch.starts.tolist() == [0, 2]
    assert batch.tables.tolist() == [[[3, 5], [7, 0]]]
    assert batch.sampling.tolist() == [0]
    assert batch.sampled_at.tolist() == [1]


def test_rows_that_no_chunk_names_compute_the_token_they_sampled() -> None:
    slots = make_slots()
    slots.begin_step(StepMessage(0, assigned_slots=(added(1, [5, 6], blocks=[2]),), chunks=column([[1, 2]])))
    slots.append_tokens(np.array([1]), np.array([99]))
    batch = slots.begin_step(StepMessage(1))
    assert batch.ids.tolist() == [99]
    assert batch.positions.tolist() == [2]
    assert slots.output_tokens(1).tolist() == [99]
    assert slots.known_tokens(1).tolist() == [5, 6, 99]


def test_a_resting_row_keeps_its_place() -> None:
    slots = make_slots()
    first = StepMessage(0, assigned_slots=(added(1, [5], blocks=[2]),), chunks=column([[1, 0]]))
    assert len(slots.begin_step(first).slots) == 0
    assert slots.begin_step(StepMessage(1)).ids.tolist() == [5]


def test_a_row_is_removed_before_it_is_given_anew() -> None:
    slots = make_slots()
    slots.begin_step(StepMessage(0, assigned_slots=(added(1, [5, 6, 7], blocks=[2]),), chunks=column([[1, 1]])))
    message = StepMessage(1, freed_slots=column([1]), assigned_slots=(added(1, [8], generation=2, blocks=[3]),))
    batch = slots.begin_step(message)
    assert batch.ids.tolist() == [8]
    assert batch.tables.tolist() == [[[3]]]


def test_blocks_are_appended() -> None:
    slots = make_slots()
    message = StepMessage(
        0,
        assigned_slots=(added(0, list(range(10)), blocks=[9]),),
        new_blocks=column([[0, 0, 4], [0, 0, 6]]),
        chunks=column([[0, 10]]),
    )
    assert slots.begin_step(message).tables.tolist() == [[[9, 4, 6]]]


def test_a_preempted_row_comes_back_with_its_output() -> None:
    slots = make_slots()
    back = SlotAssignment(0, 1, column([1, 2, 3, 50, 51]), 3, 0, (column([1, 2]),), Sampling())
    slots.begin_step(StepMessage(0, assigned_slots=(back,), chunks=column([[0, 5]])))
    assert slots.output_tokens(0).tolist() == [50, 51]


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (StepMessage(1, chunks=column([[0, 3]])), "can't compute 3 tokens after 2 of 3"),
        (StepMessage(1, chunks=column([[3, 1]])), "slot 3 (live: False)"),
        (StepMessage(1, assigned_slots=(added(0, [1], generation=2, blocks=[1]),)), "slot 0 can't take generation 2"),
        (StepMessage(1, new_blocks=column([[0, 1, 4]])), "KV group 1"),
    ],
)
def test_messages_that_contradict_the_rows_are_refused(second: StepMessage, says: str) -> None:
    slots = make_slots()
    slots.begin_step(StepMessage(0, assigned_slots=(added(0, [1, 2, 3], blocks=[1]),), chunks=column([[0, 2]])))
    with pytest.raises(RuntimeError) as caught:
        slots.begin_step(second)
    assert says in str(caught.value)


def test_tokens_without_a_block_are_refused() -> None:
    slots = make_slots()
    with pytest.raises(RuntimeError, match="in 1 blocks"):
        slots.begin_step(StepMessage(0, assigned_slots=(added(0, [1] * 5, blocks=[1]),), chunks=column([[0, 5]])))
