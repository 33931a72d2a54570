"""A worker without a model, which checks what a real one would silently get wrong.

The next token is a hash of the whole prefix, in which a placeholder counts as its item's embedding; that must be on the
device by then. The KV memory is real in shape: each slot holds the hash of the prefix
that was computed into it, and whenever a row computes, every slot of its context must hold exactly its own prefix. A
block shared too early, reused too soon or appended in the wrong order fails at once.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from engine.clock import Clock
from engine.messages import (
    ItemRef,
    PromptLogprobs,
    Sampling,
    StepMessage,
    StepResult,
    TokenLogprobs,
    column,
    decode_step,
    encode,
    int32s,
)

VOCABULARY = 50
CONTENT_BYTES = 2  # of a key: an item that isn't shared has a longer one


def prefix_hash(parent: bytes, token: int) -> bytes:
    return blake2b(parent + token.to_bytes(4, "little"), digest_size=8).digest()


def next_token(state: bytes) -> int:
    return state[0] % VOCABULARY


def content(tokens: Sequence[int], items: Sequence[ItemRef], position: int) -> int:
    """What the model sees at a position: a token, or one of an item's embeddings."""
    item = item_at(items, position)
    if item is None:
        return tokens[position]
    return 1000 * (1 + int.from_bytes(item.hash[:CONTENT_BYTES], "little")) + position - item.offset


def logprob_of(token: int) -> float:
    """What every token has, wherever it comes; a power of two, so that sums are exact."""
    return -(1 + token) / 64


def likeliest(token: int, top: int) -> list[int]:
    """The tokens said to be the most likely ones in place of another, which is the second of them."""
    return [(token + 1 - i) % VOCABULARY for i in range(top)]


def _logprobs(asked: list[tuple[int, int, int]]) -> TokenLogprobs | None:
    """Of (index, token, alternatives)."""
    if not asked:
        return None
    width = 1 + max(top for *_, top in asked)
    ids = [[token, *likeliest(token, width - 1)] for _, token, _ in asked]
    values = [[logprob_of(one) for one in line] for line in ids]
    index = [at for at, *_ in asked]
    return TokenLogprobs(width, column(index), column(ids), column(values, "<f4"), column([2] * len(asked)))


def item_at(items: Sequence[ItemRef], position: int) -> ItemRef | None:
    return next((item for item in items if item.offset <= position < item.offset + item.length), None)


def expected_tokens(
    prompt: Iterable[int], max_tokens: int, stop_ids: Iterable[int] = (), items: Sequence[ItemRef] = ()
) -> list[int]:
    """What an undisturbed request must produce."""
    state, tokens = b"", list(prompt)
    for position in range(len(tokens)):
        state = prefix_hash(state, content(tokens, items, position))
    output: list[int] = []
    while len(output) < max_tokens:
        output.append(next_token(state))
        if output[-1] in stop_ids:
            break
        state = prefix_hash(state, output[-1])
    return output


@dataclass
class FakeRow:
    generation: int
    tokens: list[int]
    tables: list[list[int]]  # of each KV group
    computed: int
    prompt_len: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    items: tuple[ItemRef, ...] = ()
    states: list[bytes] = field(default_factory=list)  # prefix hash after each computed token


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
        self.rows: dict[int, FakeRow] = {}
        self.steps: list[StepMessage] = []
        self.batch_tokens: list[int] = []
        self.row_tokens: list[dict[int, int]] = []  # per step: row -> tokens computed
        self.embeddings: set[bytes] = set()  # keys of items on the device
        self.encoded: list[bytes] = []
        self._clock = clock
        self._block_size = block_size
        self._seconds = seconds
        self._kv: dict[int, bytes] = {}
        self._busy_until = 0.0
        self._sampled: dict[int, bytes] = {}
        self._due: deque[tuple[float, int, Future[bytes]]] = deque()
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.failure: Exception | None = None

    def submit(self, step: bytes) -> Future[None]:
        message = decode_step(step)
        self.steps.append(message)
        self._apply(message)
        for one in (message, *message.following()):
            self._sampled[one.step] = self._run(one)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def sample(self, step: int, masks: bytes = b"") -> Future[bytes]:
        start = max(self._busy_until, self._clock.now())
        self._busy_until = start + self._seconds(self.steps[-1], self.batch_tokens[-1])
        result: Future[bytes] = Future()
        self._due.append((self._busy_until, step, result))
        return result

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
            if self.failure is not None:
                result.set_exception(self.failure)
            else:
                result.set_result(self._sampled.pop(step))

    def _apply(self, message: StepMessage) -> None:
        for row in int32s(message.removed).tolist():
            del self.rows[row]
        for added in message.added:
            assert added.row not in self.rows, f"row {added.row} was added over a live one"
            tokens = int32s(added.tokens).tolist()
            tables = [int32s(table).tolist() for table in added.blocks]
            assert len(tables) == len(self._windows)
            row = FakeRow(
                added.generation, tokens, tables, added.computed, added.prompt_len, added.sampling, added.items
            )
            state = b""
            for position in range(added.computed):
                state = prefix_hash(state, content(tokens, row.items, position))
                row.states.append(state)
            self.rows[added.row] = row
        for number, group, block in message.appended().tolist():
            self.rows[number].tables[group].append(block)
        self.embeddings.difference_update(message.free_items)
        for number, index in message.encode:
            key = self.rows[number].items[index].hash
            assert key not in self.embeddings, "an item was encoded again although its embeddings are there"
            self.embeddings.add(key)
            self.encoded.append(key)

    def _run(self, message: StepMessage) -> bytes:
        counts = dict(int32s(message.chunks, 2).tolist())
        plan = {number: counts.get(number, 1) for number in sorted(self.rows)}
        scored = [self._score(number, self.rows[number], count) for number, count in plan.items()]
        for number, count in plan.items():
            self._write(self.rows[number], count)
        sampled, each, drafted, asked = [], [], 0, list[tuple[int, int, int]]()
        for number, count in plan.items():
            row = self.rows[number]
            self._check_context(number, row, count)
            if count and row.computed == len(row.tokens):
                known = len(row.tokens)
                row.tokens.append(next_token(row.states[-1]))
                if count == 1 and self._draft_tokens:
                    drafted += self._guess(row)
                if row.sampling.logprobs >= 0:
                    asked += [(len(sampled) + i, row.tokens[known + i], row.sampling.logprobs)
                              for i in range(len(row.tokens) - known)]  # fmt: skip
                sampled += row.tokens[known:]
                each.append(len(row.tokens) - known)
        self.batch_tokens.append(sum(plan.values()))
        self.row_tokens.append({number: count for number, count in plan.items() if count})
        seconds = self._seconds(message, self.batch_tokens[-1])
        found = column(each) if drafted else b""
        return encode(
            StepResult(
                message.step, column(sampled), found, _logprobs(asked), seconds, drafted,
                prompt_logprobs=tuple(one for one in scored if one is not None),
            )
        )  # fmt: skip

    def _score(self, number: int, row: FakeRow, count: int) -> PromptLogprobs | None:
        """Logprobs of the prompt's tokens that the next `count` computed ones come before, where they are asked for."""
        positions = range(row.computed + 1, min(row.computed + count + 1, row.prompt_len))
        if row.sampling.prompt_logprobs < 0 or not positions:
            return None
        found = _logprobs([(at, row.tokens[at], row.sampling.prompt_logprobs) for at in positions])
        assert found is not None
        return PromptLogprobs(number, row.generation, found)

    def _guess(self, row: FakeRow) -> int:
        """Guesses that are right up to a point, and leave what isn't in the KV memory; returns how many."""
        room = len(row.tables[0]) * self._block_size - len(row.tokens) + 1
        guesses = min(self._luck.randint(0, self._draft_tokens), max(room - 1, 0))
        right = self._luck.randint(0, guesses)
        for index in range(guesses):
            if index < right:
                self._write(row, 1)
                row.tokens.append(next_token(row.states[-1]))
            else:
                for group in self._groups:
                    self._kv[self._slot(row, group, row.computed + index - right)] = b"wrong guess"
        return guesses

    def _slot(self, row: FakeRow, group: int, position: int) -> int:
        block = row.tables[group][position // self._block_size]
        assert block != 0, "the null block holds no content"
        return block * self._block_size + position % self._block_size

    def _write(self, row: FakeRow, count: int) -> None:
        for position in range(row.computed, row.computed + count):
            item = item_at(row.items, position)
            assert item is None or item.hash in self.embeddings, f"position {position} needs an item that isn't there"
            seen = content(row.tokens, row.items, position)
            state = prefix_hash(row.states[-1] if row.states else b"", seen)
            row.states.append(state)
            for group in self._groups:
                self._kv[self._slot(row, group, position)] = state
        row.computed += count

    def _check_context(self, number: int, row: FakeRow, count: int) -> None:
        """What the last `count` tokens saw, in each group, is the row's own."""
        for group, window in enumerate(self._windows):
            first = max(0, row.computed - count - window + 1) if window else 0
            for position in range(first, row.computed):
                held = self._kv.get(self._slot(row, group, position))
                assert held == row.states[position], f"row {number}: the KV at position {position} is another prefix's"
