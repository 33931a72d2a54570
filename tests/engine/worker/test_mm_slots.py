"""Which tokens of a step get which embeddings, and rotary positions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor

from engine.columns import column
from engine.messages import MMInputRef, Sampling, SlotAssignment, StepMessage, StepReports
from engine.model.encoders.base import EncodedInput
from engine.worker.encoder_cache import EncoderCache
from engine.worker.mm_slots import InputTokens, LaterStageSlots, MMSlots

IMAGE, BREAK = 100, 101
BLOCKS = (column(list(range(1, 9))),)


class Numbers:
    """Embeddings [n, 1] that count from the first value of the features; the deepstack features are their negatives."""

    def encode(self, tensors: Mapping[str, Tensor]) -> EncodedInput:
        embeddings = tensors["values"][:, None]
        return EncodedInput(embeddings, -embeddings[None])


def image(folder: Path, first: int, offset: int, length: int, count: int, **more: Any) -> MMInputRef:
    file = folder / f"{first}"
    save_file({"values": first + np.arange(count, dtype=np.float32)}, file)
    return MMInputRef(b"%d" % first, offset, length, features=str(file), **more)


def slots(**options: Any) -> MMSlots:
    return MMSlots(
        EncoderCache(Numbers(), layers=1), InputTokens(np.array([IMAGE], dtype=np.int32), **options), 4, 64, 4
    )  # fmt: skip


def assign(slot: int, prompt: list[int], inputs: tuple[MMInputRef, ...], computed: int = 0) -> SlotAssignment:
    return SlotAssignment(slot, 1, column(prompt), len(prompt), computed, BLOCKS, Sampling(), mm_inputs=inputs)


def step(number: int, *chunks: tuple[int, int], **more: Any) -> StepMessage:
    return StepMessage(number, chunks=column(chunks), **more)


def test_an_input_split_over_chunks(tmp_path: Path) -> None:
    """The example of the module."""
    ref = image(tmp_path, 10, 2, 4, 3)
    all_slots = slots()
    prompt = [1, 2, IMAGE, IMAGE, BREAK, IMAGE, 3, 4]
    first = all_slots.begin_step(step(0, (2, 3), assigned_slots=(assign(2, prompt, (ref,)),), encoder_inputs=((2, 0),)))
    assert first.mm is not None
    assert first.mm.at.tolist() == [2]
    assert first.mm.embeddings.tolist() == [[10]]
    second = all_slots.begin_step(step(1, (2, 4)))
    assert second.mm is not None
    assert second.mm.at.tolist() == [0, 2]
    assert second.mm.embeddings.tolist() == [[11], [12]]
    assert second.mm.deepstack is not None
    assert second.mm.deepstack.tolist() == [[[-11], [-12]]]
    assert all_slots.begin_step(step(2, (2, 1))).mm is None


def test_several_rows_and_a_prefix_hit_within_an_input(tmp_path: Path) -> None:
    one, two = image(tmp_path, 10, 1, 2, 2), image(tmp_path, 20, 4, 2, 2)
    prompt = [1, IMAGE, IMAGE, 2, IMAGE, IMAGE, 3]
    batch = slots().begin_step(
        step(
            0, (0, 7), (1, 5), encoder_inputs=((0, 0), (0, 1)),
            assigned_slots=(assign(0, prompt, (one, two)), assign(1, prompt, (one, two), computed=2)),
        )
    )  # fmt: skip
    assert batch.mm is not None
    assert batch.mm.at.tolist() == [1, 2, 4, 5, 7, 9, 10]
    assert batch.mm.embeddings[:, 0].tolist() == [10, 11, 20, 21, 11, 20, 21]


def test_a_step_without_inputs_has_no_rows() -> None:
    batch = slots().begin_step(step(0, (0, 3), assigned_slots=(assign(0, [1, 2, 3], ()),)))
    assert batch.mm is None
    assert batch.rotary_positions is None


def test_bidirectional_inputs_are_spans(tmp_path: Path) -> None:
    one = image(tmp_path, 10, 1, 3, 2, bidirectional=True)
    two = image(tmp_path, 20, 5, 2, 2, bidirectional=True)
    prompt = [1, IMAGE, IMAGE, BREAK, 2, IMAGE, IMAGE, 3]
    message = step(
        0, (3, 8), assigned_slots=(assign(3, prompt, (one, two)),), encoder_inputs=((3, 0), (3, 1))
    )  # fmt: skip
    batch = slots().begin_step(message)
    assert batch.mm is not None
    assert [(span.row, span.positions.tolist()) for span in batch.mm.spans] == [(0, [1, 2]), (0, [5, 6])]
    joint = slots(joint=True).begin_step(message)
    assert joint.mm is not None
    assert [span.positions.tolist() for span in joint.mm.spans] == [[1, 2, 3, 5, 6]]


def test_a_span_that_a_step_divides_is_a_fault(tmp_path: Path) -> None:
    ref = image(tmp_path, 10, 1, 2, 2, bidirectional=True)
    message = step(0, (0, 2), assigned_slots=(assign(0, [1, IMAGE, IMAGE, 2], (ref,)),), encoder_inputs=((0, 0),))
    with pytest.raises(RuntimeError, match="tokens 1 to 2 attend to each other, but a step ends before token 2"):
        slots().begin_step(message)


def test_embeddings_are_freed_before_others_are_encoded(tmp_path: Path) -> None:
    ref, all_slots = image(tmp_path, 10, 0, 1, 1), slots()
    assigned = (assign(0, [IMAGE, 1], (ref,)),)
    all_slots.begin_step(step(0, (0, 2), assigned_slots=assigned, encoder_inputs=((0, 0),)))
    all_slots.begin_step(StepMessage(1, column([0]), free_encoder_keys=(ref.hash,)))
    with pytest.raises(KeyError):
        all_slots.encoder_cache[ref.hash]


def test_rotary_positions_of_prompt_and_output(tmp_path: Path) -> None:
    """Slot 0 has an image of 2 rows and 3 columns, slot 1 none."""
    ref, all_slots = image(tmp_path, 10, 1, 6, 6, grid=(1, 2, 3)), slots(mrope=True)
    prompt = [1, *[IMAGE] * 6, 2]
    batch = all_slots.begin_step(
        step(
            0, (0, 8), (1, 2), encoder_inputs=((0, 0),),
            assigned_slots=(assign(0, prompt, (ref,)), assign(1, [1, 2], ())),
        )
    )  # fmt: skip
    assert batch.rotary_positions is not None
    assert batch.rotary_positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 0, 1],
        [0, 1, 1, 1, 2, 2, 2, 4, 0, 1],
        [0, 1, 2, 3, 1, 2, 3, 4, 0, 1],
    ]
    all_slots.append_tokens(np.array([0, 1]), np.array([5, 5]))
    later = all_slots.begin_step(StepMessage(1))
    assert later.positions.tolist() == [8, 2]
    assert later.rotary_positions is not None
    assert later.rotary_positions.tolist() == [[5, 2]] * 3
    assert torch.is_tensor(batch.mm.embeddings)  # type: ignore[union-attr]


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_rotary_positions_of_slots_that_are_assigned_anew_while_they_decode(tmp_path: Path, outputs: int) -> None:
    """As V0 does in every step: the image, 6 tokens in the prompt, takes 3 positions."""
    ref, all_slots = image(tmp_path, 10, 1, 6, 6, grid=(1, 2, 3)), slots(mrope=True)
    prompt = [1, *[IMAGE] * 6, 2]
    tokens, computed = [*prompt, *[5] * outputs], len(prompt) + outputs - 1
    again = [
        SlotAssignment(slot, 1, column(tokens), len(prompt), computed, BLOCKS, Sampling(), mm_inputs=(ref,))
        for slot in (0, 1)
    ]
    batch = all_slots.begin_step(step(0, (0, 1), (1, 1), assigned_slots=tuple(again)))
    assert batch.rotary_positions is not None
    assert batch.rotary_positions.tolist() == [[computed - 3] * 2] * 3


def test_an_input_that_cannot_be_encoded_is_zeros_and_reported(tmp_path: Path) -> None:
    one, two, all_slots = image(tmp_path, 10, 1, 2, 2), image(tmp_path, 20, 4, 2, 2), slots()
    (tmp_path / "10").unlink()
    prompt = [1, IMAGE, IMAGE, 2, IMAGE, IMAGE, 3]
    assigned = (assign(0, prompt, (one, two)),)
    batch = all_slots.begin_step(step(0, (0, 6), assigned_slots=assigned, encoder_inputs=((0, 0), (0, 1))))
    assert batch.mm is not None
    assert batch.mm.embeddings.tolist() == [[0], [0], [20], [21]]
    reports = all_slots.take_reports()
    assert reports is not None
    failed, encoded = reports.encoded
    assert failed.startswith("RuntimeError: the features of a multimodal input can't be read: ")
    assert encoded == ""
    all_slots.begin_step(step(1, (0, 1), free_encoder_keys=(b"10",)))
    assert all_slots.take_reports() is None


def test_a_fault_of_another_rank_counts(tmp_path: Path) -> None:
    ref, tokens = image(tmp_path, 10, 1, 2, 2), InputTokens(np.array([IMAGE], dtype=np.int32))
    both = MMSlots(
        EncoderCache(Numbers(), layers=1), tokens, 4, 64, 4, agree=lambda errors: ["no memory"] * len(errors)
    )
    message = step(0, (0, 3), assigned_slots=(assign(0, [1, IMAGE, IMAGE], (ref,)),), encoder_inputs=((0, 0),))
    batch = both.begin_step(message)
    assert batch.mm is not None
    assert batch.mm.embeddings.tolist() == [[0], [0]]
    assert both.take_reports() == StepReports(encoded=("no memory",))


def test_a_later_stage_has_positions_and_spans_but_no_embeddings(tmp_path: Path) -> None:
    """Both are those of the stage that encodes; what could not be encoded comes from it."""
    options = {"mrope": True}
    refs = (
        image(tmp_path, 10, 1, 4, 4, grid=(1, 2, 2)),
        image(tmp_path, 20, 6, 4, 4, grid=(1, 2, 2), bidirectional=True),
    )
    prompt = [1, *[IMAGE] * 4, 2, *[IMAGE] * 4, 3]
    asked: list[int] = []

    def causes(count: int) -> list[str]:
        asked.append(count)
        return ["", "a fault"][:count]

    encoding = slots(**options)
    later = LaterStageSlots(8, causes, InputTokens(np.array([IMAGE], dtype=np.int32), **options), 4, 64, 4)
    messages = [
        step(0, (0, 3), assigned_slots=(assign(0, prompt, refs),), encoder_inputs=((0, 0), (0, 1))),
        step(1, (0, 8)),
    ]
    for message in messages:
        wanted, found = encoding.begin_step(message), later.begin_step(message)
        assert wanted.rotary_positions is not None
        assert found.rotary_positions is not None
        assert found.rotary_positions.tolist() == wanted.rotary_positions.tolist()
        assert wanted.mm is not None
        spans = [(one.row, one.positions.tolist()) for one in wanted.mm.spans]
        if spans:
            assert found.mm is not None
            assert found.mm.embeddings.shape == (0, 8)
            assert [(one.row, one.positions.tolist()) for one in found.mm.spans] == spans
        else:
            assert found.mm is None
        if message.encoder_inputs:
            assert later.take_reports() == StepReports(encoded=("", "a fault"))
    assert later.take_reports() is None
    assert asked == [2]
    assert found.mm is not None
