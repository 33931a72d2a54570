"""Runs steps of given sizes on a started executor, without a scheduler."""

import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.columns import column
from engine.messages import Sampling, SlotAssignment, StepMessage, decode_result, encode
from engine.resolved_config import ResolvedConfig
from tests.gpu.rows import SkipError

Submitted = tuple[Future[None], Future[bytes]]
IN_FLIGHT = 2  # steps, as the core keeps


CAPTURE_S = 60.0


def wait_for_graphs(executor: Any) -> int | None:
    """Capture all sizes now, so that no item meets one that is not captured; returns how many there are."""
    steps = getattr(executor._runner, "_steps", None)
    if not hasattr(steps, "num_left"):
        return None
    deadline = time.monotonic() + CAPTURE_S
    while steps.num_left and time.monotonic() < deadline:
        time.sleep(0.05)
    return int(getattr(steps, "captured", 0))


@dataclass(frozen=True)
class Timed:
    """device: seconds of each step on the device; wall: seconds of a step where they follow each other."""

    device: list[float]
    wall: float


class StepDriver:
    """Batches of rows whose context is taken as computed, so that no prompt must be computed to time a step."""

    def __init__(self, executor: Any, resolved: ResolvedConfig, vocabulary: int):
        self._executor = executor
        self._resolved = resolved
        self._vocabulary = vocabulary
        self._num_blocks = resolved.num_blocks
        self._step = 0
        self._generation = 0
        self._live = 0  # slots in use

    def decode(self, rows: int, context: int, steps: int, warm_up: int = 3) -> Timed:
        """Steps in which each row decodes one token after `context` tokens."""
        first = self._begin(rows, context, steps + warm_up)
        for message in (first, *self._plain(warm_up - 1)):
            self._wait(self._submit(message))
        timed = self._run_ahead(self._plain(steps))
        self._free()
        return timed

    def decode_wall(self, rows: int, context: int, steps: int, warm_up: int, begin: Any, end: Any) -> None:
        """As `decode`; `begin` is called before the steps, and `end` after them."""
        first = self._begin(rows, context, steps + warm_up)
        for message in (first, *self._plain(warm_up - 1)):
            self._wait(self._submit(message))
        begin()
        self._run_ahead(self._plain(steps))
        end()
        self._free()

    def mixed(self, rows: int, context: int, tokens: int) -> float:
        """Device seconds of a step of `rows` decoding rows and one chunk of a prompt, `tokens` tokens in all."""
        chunk, seconds = tokens - rows, 0.0
        for _ in range(2):  # the first one compiles
            first = self._begin(rows, context, 2, prompt=chunk)
            seconds = self._wait(self._submit(first))
            self._free()
        return seconds

    def _begin(self, rows: int, context: int, steps: int, prompt: int = 0) -> StepMessage:
        resolved, rng = self._resolved, np.random.default_rng(0)
        size, groups = resolved.block_size, len(resolved.kv_windows)
        each, extra = -(-(context + steps + 1) // size), -(-prompt // size)
        if (rows * each + extra) * groups >= self._num_blocks:
            held = self._num_blocks * size
            raise SkipError(f"{rows} rows of {context} tokens need more than the {held} tokens of the KV cache")
        self._free()  # what an item left that failed
        self._generation += 1
        self._live = rows + (prompt > 0)
        free, assigned = iter(range(1, self._num_blocks)), []
        for slot in range(self._live):
            is_prompt = slot == rows
            length, blocks = (prompt, extra) if is_prompt else (context + 1, each)
            tables = tuple(column([next(free) for _ in range(blocks)]) for _ in range(groups))
            tokens = column(rng.integers(0, self._vocabulary, length))
            computed = 0 if is_prompt else context
            assigned.append(SlotAssignment(slot, self._generation, tokens, length, computed, tables, Sampling()))
        chunks = column([(rows, prompt)]) if prompt else b""
        return StepMessage(self._next(), assigned_slots=tuple(assigned), chunks=chunks)

    def _plain(self, steps: int) -> list[StepMessage]:
        return [StepMessage(self._next()) for _ in range(steps)]

    def _free(self) -> None:
        if self._live:
            self._wait(self._submit(StepMessage(self._next(), column(range(self._live)))))
            self._live = 0

    def _next(self) -> int:
        self._step += 1
        return self._step - 1

    def _submit(self, message: StepMessage) -> Submitted:
        return self._executor.submit(encode(message)), self._executor.sample(message.step)

    def _wait(self, submitted: Submitted) -> float:
        """Device seconds of a step."""
        forward, result = submitted
        forward.result()  # its error is the cause of the other's
        return decode_result(result.result()).seconds

    def _run_ahead(self, messages: list[StepMessage]) -> Timed:
        began, flying, device = time.perf_counter(), deque[Submitted](), []
        for message in messages:
            if len(flying) == IN_FLIGHT:
                device.append(self._wait(flying.popleft()))
            flying.append(self._submit(message))
        device += [self._wait(result) for result in flying]
        return Timed(device, (time.perf_counter() - began) / len(messages))
