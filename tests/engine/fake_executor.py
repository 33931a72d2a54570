"""A worker without a model, which detects what a real one would silently get wrong.

The next token is a hash of the whole prefix, in which a placeholder counts as an embedding of its multimodal input,
which must be on the device by then. The KV memory is real in shape: each entry holds the hash of the prefix that was
computed into it, and whenever a slot computes, every entry of its context must hold exactly its own prefix. A block
shared too early, reused too soon or appended in the wrong order fails at once. What is computed with an input that
could not be encoded is `FAULT`, and so is everything after it.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
from msgspec.structs import replace

from engine.clock import Clock
from engine.columns import column, int32s
from engine.grammar import TokenMasks
from engine.logprob_columns import PromptLogprobs, TokenLogprobs
from engine.messages import (
    COPY_OUT,
    CopyingStep,
    MMInputRef,
    Sampling,
    StepMessage,
    StepReports,
    StepResult,
    decode_copying_step,
    decode_result,
    encode,
)

VOCABULARY = 50
FAULT = b"fault"
CONTENT_BYTES = 2  # of a key: an input that isn't shared has a longer one


def prefix_hash(parent: bytes, token: int) -> bytes:
    if parent == FAULT:
        return FAULT
    return blake2b(parent + token.to_bytes(4, "little"), digest_size=8).digest()


def next_token(state: bytes) -> int:
    return state[0] % VOCABULARY


def content(tokens: Sequence[int], mm_inputs: Sequence[MMInputRef], position: int) -> int:
    """What the model sees at a position: a token, or one of an input's embeddings."""
    mm_input = mm_input_at(mm_inputs, position)
    if mm_input is None:
        return tokens[position]
    return 1000 * (1 + int.from_bytes(mm_input.hash[:CONTENT_BYTES], "little")) + position - mm_input.offset


def logprob_of(token: int) -> float:
    """What every token has, wherever it comes; a power of two, so that sums are exact."""
    return -(1 + token) / 64


def top_tokens(token: int, top: int) -> list[int]:
    """The tokens said to be the most likely ones in place of another, which is the second of them."""
    return [(token + 1 - i) % VOCABULARY for i in range(top)]


def _logprobs(asked: list[tuple[int, int, int]]) -> TokenLogprobs | None:
    """Of (index, token, alternatives)."""
    if not asked:
        return None
    width = 1 + max(top for *_, top in asked)
    ids = [[token, *top_tokens(token, width - 1)] for _, token, _ in asked]
    values = [[logprob_of(one) for one in line] for line in ids]
    index = [at for at, *_ in asked]
    return TokenLogprobs(width, column(index), column(ids), column(values, "<f4"), column([2] * len(asked)))


def mm_input_at(mm_inputs: Sequence[MMInputRef], position: int) -> MMInputRef | None:
    return next(
        (mm_input for mm_input in mm_inputs if mm_input.offset <= position < mm_input.offset + mm_input.length), None
    )


def expected_tokens(
    prompt: Iterable[int], max_tokens: int, stop_ids: Iterable[int] = (), mm_inputs: Sequence[MMInputRef] = ()
) -> list[int]:
    """What an undisturbed request must produce."""
    state, tokens = b"", list(prompt)
    for position in range(len(tokens)):
        state = prefix_hash(state, content(tokens, mm_inputs, position))
    output: list[int] = []
    while len(output) < max_tokens:
        output.append(next_token(state))
        if output[-1] in stop_ids:
            break
        state = prefix_hash(state, output[-1])
    return output


@dataclass
class FakeSlot:
    generation: int
    tokens: list[int]
    tables: list[list[int]]  # of each KV group
    computed: int
    prompt_len: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    mm_inputs: tuple[MMInputRef, ...] = ()
    states: list[bytes] = field(default_factory=list)  # prefix hash after each computed token
    constrained: bool = False


class FakeExecutor:
    """Works off steps in order; results become due `seconds(step)` after they were handed over, by the clock."""

    def __init__(
        self,
        clock: Clock,
        block_size: int,
        seconds: Callable[[StepMessage, int], float] = lambda *_: 0.0,
        draft_tokens: int = 0,
        windows: Sequence[int] = (0,),
    ):
        self._windows = windows
        self._groups = range(len(windows))
        self._draft_tokens = draft_tokens
        self._luck = random.Random(1)
        self.slots: dict[int, FakeSlot] = {}
        self.steps: list[StepMessage] = []
        self.batch_tokens: list[int] = []
        self.slot_tokens: list[dict[int, int]] = []  # per step: slot -> tokens computed
        self.embeddings: set[bytes] = set()  # keys of multimodal inputs on the device
        self.encoded: list[bytes] = []
        self.fails: Callable[[], bool] = lambda: False  # whether the next input can't be encoded
        self.faulty: set[bytes] = set()  # keys of those on the device that could not be
        self.num_faults = 0
        self._errors: list[str] = []  # of the newest step's inputs
        self._clock = clock
        self._block_size = block_size
        self._seconds = seconds
        self._kv: dict[int, bytes] = {}
        self.host: dict[int, list[bytes | None]] = {}  # entries of host blocks
        self.copied_in: dict[int, int] = {}  # the last step that copies to or from each host block
        self.copied_out: dict[int, int] = {}  # the last step that copies to it
        self.delivered = 0  # the last step whose result is known; those that only copy have negative numbers
        self._busy_until = 0.0
        self._sampled: dict[int, bytes] = {}
        self._due: deque[tuple[float, int, Future[bytes]]] = deque()
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.failure: Exception | None = None
        self.script: bytes | None = None  # what all requests get in place of hashes, then zeros
        self.obeys_masks = False  # replace tokens that masks exclude by the first ones that they allow
        self._owners: dict[int, list[int]] = {}  # of steps that aren't sampled yet: the slot of each token

    def submit(self, step: bytes) -> Future[None]:
        message = decode_copying_step(step)
        self.steps.append(message)
        self._copy(message)
        self._apply(message)
        for one in (message, *message.later_steps()):
            self._sampled[one.step] = self._run(one)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def sample(self, step: int, masks: bytes = b"") -> Future[bytes]:
        start = max(self._busy_until, self._clock.now())
        self._busy_until = start + self._seconds(self.steps[-1], self.batch_tokens[-1])
        owners = self._owners.pop(step)
        if masks and self.obeys_masks:
            self._sampled[step] = self._masked(self._sampled[step], owners, TokenMasks(masks))
        result: Future[bytes] = Future()
        self._due.append((self._busy_until, step, result))
        return result

    def _masked(self, sampled: bytes, owners: list[int], masks: TokenMasks) -> bytes:
        result = decode_result(sampled)
        tokens = int32s(result.tokens).copy()
        for index, number in enumerate(owners):
            allowed = masks.accepted(number, int(tokens.max()) + 1)
            if allowed is not None and not allowed[tokens[index]]:
                everything = masks.accepted(number, 1 << 16)
                assert everything is not None
                tokens[index] = self.slots[number].tokens[-1] = int(np.flatnonzero(everything)[0])
        return encode(replace(result, tokens=tokens.tobytes()))

    def call(self, method: str, arguments: dict[str, Any]) -> Future[Any]:
        """Whatever it is asked for is done."""
        self.calls.append((method, arguments))
        done: Future[Any] = Future()
        done.set_result(0)
        return done

    def shutdown(self) -> None:
        self._due.clear()

    @property
    def next_due(self) -> float | None:
        return self._due[0][0] if self._due else None

    def pump(self) -> None:
        """Deliver what is due by now."""
        while self._due and self._due[0][0] <= self._clock.now():
            _, step, result = self._due.popleft()
            self.delivered = max(self.delivered, step)
            if self.failure is not None:
                result.set_exception(self.failure)
            else:
                result.set_result(self._sampled.pop(step))

    def _copy(self, message: CopyingStep) -> None:
        size = self._block_size
        for direction, block, host_block in int32s(message.block_copies, 3).tolist():
            entries = range(block * size, (block + 1) * size)
            if direction == COPY_OUT:
                self.host[host_block] = [self._kv.get(entry) for entry in entries]
                self.copied_out[host_block] = message.step
            else:
                for entry, state in zip(entries, self.host[host_block], strict=True):
                    self._kv[entry] = state or b"nothing"
            self.copied_in[host_block] = message.step

    def _apply(self, message: StepMessage) -> None:
        for freed in int32s(message.freed_slots).tolist():
            del self.slots[freed]
        for added in message.assigned_slots:
            assert added.slot not in self.slots, f"slot {added.slot} was assigned while it was live"
            tokens = int32s(added.tokens).tolist()
            tables = [int32s(table).tolist() for table in added.block_tables]
            assert len(tables) == len(self._windows)
            slot = FakeSlot(
                added.generation,
                tokens,
                tables,
                added.num_computed_tokens,
                added.num_prompt_tokens,
                added.sampling,
                added.mm_inputs,
                constrained=added.constrained,
            )
            state = b""
            for position in range(added.num_computed_tokens):
                state = prefix_hash(state, content(tokens, slot.mm_inputs, position))
                slot.states.append(state)
            self.slots[added.slot] = slot
        for number, group, block in message.unpack_new_blocks().tolist():
            self.slots[number].tables[group].append(block)
        self.embeddings.difference_update(message.free_encoder_keys)
        self.faulty.difference_update(message.free_encoder_keys)
        self._errors = []
        for number, index in message.encoder_inputs:
            key = self.slots[number].mm_inputs[index].hash
            assert key not in self.embeddings, "a multimodal input was encoded again although its embeddings are there"
            self.embeddings.add(key)
            self.encoded.append(key)
            self._errors.append("the tower fails" if self.fails() else "")
            if self._errors[-1]:
                self.faulty.add(key)
                self.num_faults += 1

    def _run(self, message: StepMessage) -> bytes:
        counts = dict(int32s(message.chunks, 2).tolist())
        plan = {number: counts.get(number, 1) for number in sorted(self.slots)}
        scored = [self._score(number, self.slots[number], count) for number, count in plan.items()]
        for number, count in plan.items():
            self._write(self.slots[number], count)
        while any(self._spread_fault(self.slots[number], count) for number, count in plan.items() if count):
            pass
        sampled, each, drafted, asked = [], [], 0, list[tuple[int, int, int]]()
        owners = self._owners[message.step] = list[int]()
        for number, count in plan.items():
            slot = self.slots[number]
            self._check_context(number, slot, count)
            if count and slot.computed == len(slot.tokens):
                known = len(slot.tokens)
                slot.tokens.append(self._next_token(slot))
                if count == 1 and self._draft_tokens and not slot.constrained:
                    drafted += self._propose_drafts(slot)
                if slot.sampling.logprobs >= 0:
                    asked += [(len(sampled) + i, slot.tokens[known + i], slot.sampling.logprobs)
                              for i in range(len(slot.tokens) - known)]  # fmt: skip
                sampled += slot.tokens[known:]
                owners += [number] * (len(slot.tokens) - known)
                each.append(len(slot.tokens) - known)
        self.batch_tokens.append(sum(plan.values()))
        self.slot_tokens.append({number: count for number, count in plan.items() if count})
        seconds = self._seconds(message, self.batch_tokens[-1])
        found = column(each) if drafted else b""
        return encode(
            StepResult(
                message.step, column(sampled), found, _logprobs(asked), seconds, drafted,
                StepReports(encoded=tuple(self._errors)) if message.encoder_inputs else None,
                prompt_logprobs=tuple(one for one in scored if one is not None),
            )
        )  # fmt: skip

    def _next_token(self, slot: FakeSlot) -> int:
        if self.script is None:
            return next_token(slot.states[-1])
        at = len(slot.tokens) - slot.prompt_len
        return self.script[at] if at < len(self.script) else 0

    def _score(self, number: int, slot: FakeSlot, count: int) -> PromptLogprobs | None:
        """Logprobs of the prompt's tokens that the next `count` computed ones come before, where they are asked for."""
        positions = range(slot.computed + 1, min(slot.computed + count + 1, slot.prompt_len))
        if slot.sampling.prompt_logprobs < 0 or not positions:
            return None
        found = _logprobs([(at, slot.tokens[at], slot.sampling.prompt_logprobs) for at in positions])
        assert found is not None
        return PromptLogprobs(number, slot.generation, found)

    def _propose_drafts(self, slot: FakeSlot) -> int:
        """Draft tokens of which the first ones are accepted; the others leave wrong KV. Returns how many."""
        room = len(slot.tables[0]) * self._block_size - len(slot.tokens) + 1
        drafts = min(self._luck.randint(0, self._draft_tokens), max(room - 1, 0))
        right = self._luck.randint(0, drafts)
        for index in range(drafts):
            if index < right:
                self._write(slot, 1)
                slot.tokens.append(self._next_token(slot))
            else:
                for group in self._groups:
                    self._kv[self._kv_entry(slot, group, slot.computed + index - right)] = b"rejected draft token"
        return drafts

    def _kv_entry(self, slot: FakeSlot, group: int, position: int) -> int:
        block = slot.tables[group][position // self._block_size]
        assert block != 0, "the null block holds no content"
        return block * self._block_size + position % self._block_size

    def _write(self, slot: FakeSlot, count: int) -> None:
        for position in range(slot.computed, slot.computed + count):
            mm_input = mm_input_at(slot.mm_inputs, position)
            assert mm_input is None or mm_input.hash in self.embeddings, (
                f"position {position} needs a multimodal input that isn't there"
            )
            seen = content(slot.tokens, slot.mm_inputs, position)
            state = prefix_hash(slot.states[-1] if slot.states else b"", seen)
            if mm_input is not None and mm_input.hash in self.faulty:
                state = FAULT
            slot.states.append(state)
            for group in self._groups:
                self._kv[self._kv_entry(slot, group, position)] = state
        slot.computed += count

    def _spread_fault(self, slot: FakeSlot, count: int) -> bool:
        """Whether the last `count` tokens turn out to have a fault in their context."""
        start = slot.computed - count
        if slot.states[start] == FAULT or not any(
            self._kv.get(self._kv_entry(slot, group, position)) == FAULT
            for group, first in self._contexts(slot, count)
            for position in range(first, start)
        ):
            return False
        slot.states[start:] = [FAULT] * count
        for group in self._groups:
            for position in range(start, slot.computed):
                self._kv[self._kv_entry(slot, group, position)] = FAULT
        return True

    def has_fault(self, block: int) -> bool:
        size = self._block_size
        return any(self._kv.get(entry) == FAULT for entry in range(block * size, (block + 1) * size))

    def _contexts(self, slot: FakeSlot, count: int) -> list[tuple[int, int]]:
        """Of each group, the first position that the last `count` tokens attend to."""
        return [
            (group, max(0, slot.computed - count - window + 1) if window else 0)
            for group, window in enumerate(self._windows)
        ]

    def _check_context(self, number: int, slot: FakeSlot, count: int) -> None:
        """What the last `count` tokens saw, in each group, is the slot's own."""
        for group, first in self._contexts(slot, count):
            for position in range(first, slot.computed):
                held = self._kv.get(self._kv_entry(slot, group, position))
                assert held in (slot.states[position], FAULT), (
                    f"slot {number}: the KV at position {position} is another prefix's"
                )
