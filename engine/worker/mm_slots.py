"""The slots of a model that takes multimodal inputs.

Example: tokens 2 to 5 of a prompt are an image, of which token 4 is a line break; the step computes tokens 3 to 6:

    token                 0  1  2  3  4  5  6
    embedding                   0  1     2
    computed in the step           x  x  x  x
    StepBatch.mm.at                0     2         with the embeddings 1 and 2
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import numpy as np
import torch

from engine.arrays import Int32s, Int64s
from engine.columns import int32s
from engine.kernels.attention import Span
from engine.messages import MMInputRef, SlotAssignment, StepMessage, StepReports
from engine.model.encoders.base import EncodedInput
from engine.worker.encoder_cache import EncoderCache
from engine.worker.encoder_faults import Agree, agreement, error_of
from engine.worker.mm_rows import MMRows
from engine.worker.mrope import GridInput, rotary_positions, runs_of
from engine.worker.rank_protocol import Features
from engine.worker.slots import StepBatch, WorkerSlots


@dataclass(frozen=True, slots=True)
class InputTokens:
    """How a model's inputs lie in a prompt.

    Args:
        embedding_ids: the tokens that stand for an embedding within the tokens of an input.
        mrope: rotary positions have three sections.
        tokens_per_second: see `engine.worker.mrope`.
        joint: all tokens of the bidirectional inputs of a prompt attend to each other, not only those that stand for an
            embedding and to those of the same input.
        joint_ids: those that do, if the inputs also have tokens of text (times of frames); None: all do.
    """

    embedding_ids: Int32s
    mrope: bool = False
    tokens_per_second: float | None = None
    joint: bool = False
    joint_ids: Int32s | None = None


@dataclass(frozen=True, slots=True)
class _SlotInput:
    ref: MMInputRef
    at: Int64s  # positions of the tokens that stand for an embedding, ascending
    joint_at: Int64s  # of those that attend to all other inputs

    def overlaps(self, begin: int, end: int) -> bool:
        return self.ref.offset < end and self.ref.offset + self.ref.length > begin


class MMSlots(WorkerSlots):
    """Slots with inputs; a step also encodes those that the core asks for.

    Args:
        cache: the embeddings.
        input_tokens: how inputs lie in a prompt.
        shape: arguments of the base class.
        agree: see `engine.worker.encoder_faults.agreement`; None: there is one rank.
    """

    def __init__(
        self, cache: EncoderCache, input_tokens: InputTokens, *shape: Any, agree: Agree | None = None, **more: Any
    ):
        super().__init__(*shape, **more)
        self._agree = agree or agreement()
        self._encoded: tuple[str, ...] = ()  # of the step that began last: see `StepReports.encoded`
        self.encoder_cache = cache
        self._tokens_of_inputs = input_tokens
        self._inputs: dict[int, list[_SlotInput]] = {}  # by slot, only slots with inputs
        self._unfinished: set[int] = set()  # slots with an embedding that isn't computed yet
        self._rotary: dict[int, Int64s] = {}  # by slot, of prompts with inputs that are left to compute: [3, tokens]
        self._rotary_delta: Int64s = np.zeros(len(self.live), dtype=np.int64)

    def begin_step(self, message: StepMessage) -> StepBatch:
        """As in the base class; frees and encodes inputs, and adds the embeddings of the step's tokens."""
        self.encoder_cache.free(message.free_encoder_keys)
        batch = super().begin_step(message)
        if message.encoder_inputs:
            self._encode([self._inputs[slot][index] for slot, index in message.encoder_inputs])
        rows = self._find_rows(batch) if self._unfinished else None
        rotary = self._find_rotary(batch) if self._tokens_of_inputs.mrope else None
        if rows is None and rotary is None:
            return batch
        return dataclasses.replace(batch, mm=rows, rotary_positions=rotary)

    def put_features(self, features: Features) -> None:
        self.encoder_cache.put_features(features)

    def take_reports(self) -> StepReports | None:
        """As in the base class; also whether inputs were encoded."""
        reports = super().take_reports()
        if self._encoded:
            encoded, self._encoded = self._encoded, ()
            reports = msgspec.structs.replace(reports or StepReports(), encoded=encoded)
        return reports

    def _encode(self, inputs: list[_SlotInput]) -> None:
        """Encode inputs. One that can't be encoded, on any rank, is zeros until the core ends its requests."""
        errors = self._agree([error_of(partial(self.encoder_cache.encode, one.ref, len(one.at))) for one in inputs])
        for one, error in zip(inputs, errors, strict=True):
            if error:
                self.encoder_cache.put_zeros(one.ref.hash, len(one.at))
        self._encoded = tuple(errors)

    def _assign(self, assignment: SlotAssignment) -> None:
        super()._assign(assignment)
        slot, tokens = assignment.slot, int32s(assignment.tokens)
        self._forget(slot)
        if not assignment.mm_inputs:
            return
        inputs = []
        for ref in assignment.mm_inputs:
            own, joint_ids = tokens[ref.offset : ref.offset + ref.length], self._tokens_of_inputs.joint_ids
            at = np.flatnonzero(np.isin(own, self._tokens_of_inputs.embedding_ids)) + ref.offset
            joint = np.arange(len(own)) if joint_ids is None else np.flatnonzero(np.isin(own, joint_ids))
            inputs.append(_SlotInput(ref, at, joint + ref.offset))
        self._inputs[slot] = inputs
        self._unfinished.add(slot)
        if self._tokens_of_inputs.mrope:
            grids = [GridInput(one.at, one.ref.grid, one.ref.seconds_per_frame) for one in inputs]
            rotary, self._rotary_delta[slot] = rotary_positions(
                assignment.num_prompt_tokens, grids, self._tokens_of_inputs.tokens_per_second
            )
            # Otherwise none is left: V0 assigns running slots anew, and after a preemption a prefix hit may cover all.
            if assignment.num_computed_tokens < assignment.num_prompt_tokens:
                self._rotary[slot] = rotary

    def _apply_changes(self, message: StepMessage) -> None:
        if message.freed_slots:
            for slot in int32s(message.freed_slots).tolist():
                self._forget(slot)
        super()._apply_changes(message)

    def _forget(self, slot: int) -> None:
        self._inputs.pop(slot, None)
        self._rotary.pop(slot, None)
        self._unfinished.discard(slot)
        self._rotary_delta[slot] = 0

    def _find_rows(self, batch: StepBatch) -> MMRows | None:
        """The embeddings of the step's tokens; slots whose last embedding is among them are finished."""
        at, parts, spans = [], list[EncodedInput](), list[Span]()
        for i in np.flatnonzero(np.isin(batch.slots, list(self._unfinished))).tolist():
            slot, computed = int(batch.slots[i]), int(batch.num_computed_tokens[i])
            inputs, end = self._inputs[slot], computed + int(batch.counts[i])
            for one in inputs:
                low, high = np.searchsorted(one.at, (computed, end)).tolist()
                if low < high or (self._tokens_of_inputs.joint and one.overlaps(computed, end)):
                    at.append(one.at[low:high] - computed + batch.starts[i])
                    parts.append(_part(self.encoder_cache[one.ref.hash], low, high))
            spans += _spans(i, inputs, computed, end, joint=self._tokens_of_inputs.joint)
            if end > max(int(one.at[-1]) if len(one.at) else 0 for one in inputs):
                self._unfinished.discard(slot)
        if not at:
            return None
        deepstack = [part.deepstack for part in parts if part.deepstack is not None]
        return MMRows(
            np.concatenate(at),
            torch.cat([part.embeddings for part in parts]),
            torch.cat(deepstack, 1) if deepstack else None,
            tuple(spans),
        )

    def _find_rotary(self, batch: StepBatch) -> Int64s:
        """`StepBatch.rotary_positions`."""
        flat = batch.positions + self._rotary_delta[batch.slots][batch.row_of]
        found = np.repeat(flat[None], 3, 0)
        for i in np.flatnonzero(np.isin(batch.slots, list(self._rotary))).tolist() if self._rotary else ():
            slot, computed = int(batch.slots[i]), int(batch.num_computed_tokens[i])
            rotary = self._rotary[slot]
            start, count = int(batch.starts[i]), min(int(batch.counts[i]), rotary.shape[1] - computed)
            found[:, start : start + count] = rotary[:, computed : computed + count]
            if computed + count == rotary.shape[1]:  # from now on the slot's delta is enough
                del self._rotary[slot]
        return found


def _part(encoded: EncodedInput, low: int, high: int) -> EncodedInput:
    deepstack = encoded.deepstack
    return EncodedInput(encoded.embeddings[low:high], None if deepstack is None else deepstack[:, low:high])


def _spans(row: int, inputs: list[_SlotInput], computed: int, end: int, *, joint: bool) -> Iterator[Span]:
    """The bidirectional inputs with a token in the step, which is one of theirs or follows a prefix hit within them.

    An input of several parts with text between them (crops of Gemma 3) is a span for each part, unless all are joint.
    """
    chosen = [one for one in inputs if one.ref.bidirectional]
    parts = [run for one in chosen for run in runs_of(one.at)]
    if joint and chosen:
        parts = [np.concatenate([one.joint_at for one in chosen])]
    for at in parts:
        if len(at) and at[0] < end and at[-1] >= computed:
            if at[-1] >= end:
                raise RuntimeError(
                    f"tokens {at[0]} to {at[-1]} attend to each other, but a step ends before token {end}"
                )
            yield Span(row, at)
