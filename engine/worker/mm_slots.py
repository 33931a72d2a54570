"""The slots of a model that takes multimodal inputs.

Example: tokens 2 to 5 of a prompt are an image, of which token 4 is a line break; the step computes tokens 3 to 6:

    token                 0  1  2  3  4  5  6
    embedding                   0  1     2
    computed in the step           x  x  x  x
    StepBatch.mm.at                0     2         with the embeddings 1 and 2
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterator
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
from engine.worker.encoder_faults import error_of
from engine.worker.mm_rows import MMRows
from engine.worker.mrope import GridInput, rotary_positions, runs_of
from engine.worker.rank_causes import Agree, agreement
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


@dataclass(frozen=True, slots=True)
class _StepInputs:
    """The inputs of a step's tokens.

    parts: of each an input, the range of its embeddings, and the indices in the batch of the tokens that stand for one.
    spans: tokens that attend to each other.
    """

    parts: list[tuple[_SlotInput, int, int, Int64s]]
    spans: tuple[Span, ...]


class InputSlots(WorkerSlots):
    """Slots whose prompts have inputs: where they lie, and what follows from that for rotary positions and attention.

    Args:
        input_tokens: how inputs lie in a prompt.
        shape: arguments of the base class.
    """

    def __init__(self, input_tokens: InputTokens, *shape: Any, **more: Any):
        super().__init__(*shape, **more)
        self._encoded: tuple[str, ...] = ()  # of the step that began last: see `StepReports.encoded`
        self._tokens_of_inputs = input_tokens
        self._inputs: dict[int, list[_SlotInput]] = {}  # by slot, only slots with inputs
        self._unfinished: set[int] = set()  # slots with an embedding that isn't computed yet
        self._rotary: dict[int, Int64s] = {}  # by slot, of prompts with inputs that are left to compute: [3, tokens]
        self._rotary_delta: Int64s = np.zeros(len(self.live), dtype=np.int64)

    @abstractmethod
    def _encode(self, inputs: list[_SlotInput]) -> list[str]:
        """Encode the inputs that a step asks for; the cause of each that could not be encoded, else ""."""

    @abstractmethod
    def _make_rows(self, found: _StepInputs) -> MMRows | None:
        """`StepBatch.mm`; None if the step has no input."""

    def begin_step(self, message: StepMessage) -> StepBatch:
        """As in the base class; also encodes inputs, and adds what the step's tokens need of them."""
        batch = super().begin_step(message)
        if message.encoder_inputs:
            asked = [self._inputs[slot][index] for slot, index in message.encoder_inputs]
            self._encoded = tuple(self._encode(asked))
        rows = self._make_rows(self._find_inputs(batch)) if self._unfinished else None
        rotary = self._find_rotary(batch) if self._tokens_of_inputs.mrope else None
        if rows is None and rotary is None:
            return batch
        return dataclasses.replace(batch, mm=rows, rotary_positions=rotary)

    def take_reports(self) -> StepReports | None:
        """As in the base class; also whether inputs were encoded."""
        reports = super().take_reports()
        if self._encoded:
            encoded, self._encoded = self._encoded, ()
            reports = msgspec.structs.replace(reports or StepReports(), encoded=encoded)
        return reports

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

    def _find_inputs(self, batch: StepBatch) -> _StepInputs:
        """The inputs of the step's tokens; slots whose last embedding is among them are finished."""
        parts, spans, joint = list[tuple[_SlotInput, int, int, Int64s]](), list[Span](), self._tokens_of_inputs.joint
        for i in np.flatnonzero(np.isin(batch.slots, list(self._unfinished))).tolist():
            slot, computed = int(batch.slots[i]), int(batch.num_computed_tokens[i])
            inputs, end = self._inputs[slot], computed + int(batch.counts[i])
            for one in inputs:
                low, high = np.searchsorted(one.at, (computed, end)).tolist()
                if low < high or (joint and one.overlaps(computed, end)):
                    parts.append((one, low, high, one.at[low:high] - computed + batch.starts[i]))
            spans += _spans(i, inputs, computed, end, joint=joint)
            if end > max(int(one.at[-1]) if len(one.at) else 0 for one in inputs):
                self._unfinished.discard(slot)
        return _StepInputs(parts, tuple(spans))

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


class MMSlots(InputSlots):
    """Slots with inputs that this rank encodes.

    Args:
        cache: the embeddings.
        input_tokens: how inputs lie in a prompt.
        shape: arguments of the base class.
        agree: see `engine.worker.rank_causes.agreement`; None: there is one rank.
    """

    def __init__(
        self, cache: EncoderCache, input_tokens: InputTokens, *shape: Any, agree: Agree | None = None, **more: Any
    ):
        super().__init__(input_tokens, *shape, **more)
        self._agree = agree or agreement()
        self.encoder_cache = cache

    def begin_step(self, message: StepMessage) -> StepBatch:
        """As in the base class; also frees embeddings."""
        self.encoder_cache.free(message.free_encoder_keys)
        return super().begin_step(message)

    def put_features(self, features: Features) -> None:
        self.encoder_cache.put_features(features)

    def _encode(self, inputs: list[_SlotInput]) -> list[str]:
        """Encode inputs. One that can't be encoded, on any rank, is zeros until the core ends its requests."""
        errors = self._agree([error_of(partial(self.encoder_cache.encode, one.ref, len(one.at))) for one in inputs])
        for one, error in zip(inputs, errors, strict=True):
            if error:
                self.encoder_cache.put_zeros(one.ref.hash, len(one.at))
        return errors

    def _make_rows(self, found: _StepInputs) -> MMRows | None:
        if not found.parts:
            return None
        parts = [_part(self.encoder_cache[one.ref.hash], low, high) for one, low, high, _ in found.parts]
        deepstack = [part.deepstack for part in parts if part.deepstack is not None]
        return MMRows(
            np.concatenate([at for *_, at in found.parts]),
            torch.cat([part.embeddings for part in parts]),
            torch.cat(deepstack, 1) if deepstack else None,
            found.spans,
        )


class LaterStageSlots(InputSlots):
    """Slots of a pipeline stage that does not encode: the hidden states that it gets have the embeddings.

    Args:
        hidden: numbers of an embedding.
        receive_causes: why each of that many inputs could not be encoded, from the stage that does.
        input_tokens, shape: as of the base class.
    """

    def __init__(self, hidden: int, receive_causes: Callable[[int], list[str]], input_tokens: InputTokens, *shape: Any):
        super().__init__(input_tokens, *shape)
        self._receive_causes = receive_causes
        self._no_embeddings = torch.empty(0, hidden)

    def _encode(self, inputs: list[_SlotInput]) -> list[str]:
        return self._receive_causes(len(inputs))

    def _make_rows(self, found: _StepInputs) -> MMRows | None:
        if not found.spans:
            return None
        return MMRows(np.zeros(0, dtype=np.int64), self._no_embeddings, spans=found.spans)


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
