"""The EngineCore under measurement: a worker without a model, meters, and the cells of `make bench-core`.

Everything runs in one thread under a clock that is told the time. What is counted is that thread's CPU time, with the
garbage collector off, and the worker's own work always outside of what is timed.
"""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.clock import FakeClock
from engine.columns import column, int32s
from engine.core.engine import EngineCore
from engine.core.request import Request
from engine.messages import (
    AddRequest,
    Outputs,
    Sampling,
    StepMessage,
    StepResult,
    decode_from_core,
    decode_step,
    decode_to_core,
    encode,
    make_handle,
)
from engine.resolved_config import ResolvedConfig

BLOCK_SIZE = 16
VOCABULARY = 30_000
SLOW_STEP_S = 0.05  # a device so slow that steps are planned one by one
QUICK_STEP_S = 0.001  # one so quick that bursts pay
ROUND_STEPS = 64  # a multiple of the block size: each round holds the same share of new blocks
WARM_UP_STEPS = 128

thread_ns = time.thread_time_ns


class TableWorker:
    """Answers steps from a table of rows, with random tokens; `pump` delivers one result."""

    def __init__(self, rows: int, step_s: float):
        self.message_bytes: list[int] = []
        self._step_s = step_s
        self._live = np.zeros(rows, np.bool_)
        self._computed = np.zeros(rows, np.int64)
        self._known = np.zeros(rows, np.int64)
        self._random = np.random.default_rng(1)
        self._submitted: deque[bytes] = deque()
        self._steps: deque[StepMessage] = deque()
        self._results: deque[Future[bytes]] = deque()
        self._done: Future[None] = Future()
        self._done.set_result(None)

    def submit(self, step: bytes) -> "Future[None]":
        self.message_bytes.append(len(step))
        self._submitted.append(step)
        return self._done

    def sample(self, step: int, masks: bytes = b"") -> "Future[bytes]":
        result: Future[bytes] = Future()
        self._results.append(result)
        return result

    def call(self, method: str, arguments: dict[str, Any]) -> "Future[Any]":
        raise NotImplementedError(method)

    def shutdown(self) -> None:
        self._results.clear()

    def pump(self) -> None:
        if not self._results:
            return
        if not self._steps:
            message = decode_step(self._submitted.popleft())
            self._apply(message)
            self._steps += [message, *message.later_steps()]
        self._results.popleft().set_result(self._answer(self._steps.popleft()))

    def _apply(self, message: StepMessage) -> None:
        self._live[int32s(message.freed_slots)] = False
        for added in message.assigned_slots:
            self._live[added.slot] = True
            self._computed[added.slot] = added.num_computed_tokens
            self._known[added.slot] = len(added.tokens) // 4

    def _answer(self, message: StepMessage) -> bytes:
        count = self._live.astype(np.int64)
        chunks = int32s(message.chunks, 2)
        count[chunks[:, 0]] = chunks[:, 1]
        self._computed += count
        sampling = (count > 0) & (self._computed == self._known)
        self._known += sampling
        tokens = self._random.integers(3, VOCABULARY, int(sampling.sum()), dtype=np.int32)
        return encode(StepResult(message.step, tokens.tobytes(), seconds=self._step_s))


class Meter:
    """Thread-CPU ns of the calls of one function, one entry a call."""

    def __init__(self, call: Callable[..., Any]):
        self.samples: list[int] = []
        self._call = call

    def __call__(self, *args: Any, **named: Any) -> Any:
        begin = thread_ns()
        result = self._call(*args, **named)
        self.samples.append(thread_ns() - begin)
        return result

    def take(self) -> list[int]:
        samples, self.samples = self.samples, []
        return samples


class MeteredCore:
    """An EngineCore whose scheduler's calls are metered one by one."""

    def __init__(self, config: ResolvedConfig, step_s: float = SLOW_STEP_S):
        self.clock = FakeClock()
        self.worker = TableWorker(config.max_num_seqs, step_s)
        self.core = EngineCore(config, self.worker, self.clock, self._take)
        self.client_bytes: list[int] = []
        self.sent: list[bytes] = []
        self._step_s = step_s
        self._sequence = 0
        scheduler: Any = self.core.scheduler
        self.add = scheduler.add = Meter(scheduler.add)
        self.schedule = scheduler.schedule = Meter(scheduler.schedule)
        self.update = scheduler.update = Meter(scheduler.update)
        self.step = Meter(self.core.step)
        self.receive = Meter(self.core.receive)

    def request(self, prompt: np.ndarray, max_tokens: int) -> bytes:
        self._sequence += 1
        return encode(AddRequest(make_handle(0, self._sequence), column(prompt), max_tokens, Sampling()))

    def turn(self) -> None:
        """Results are booked, later the next step is planned, then the device ends one."""
        self.step(self.clock.now())
        wait = self.core.next_deadline(self.clock.now()) or 0.0
        if wait:
            self.clock.advance(wait)
            self.step(self.clock.now())
        self.clock.advance(self._step_s - wait)
        self.worker.pump()

    def drain(self) -> None:
        while self.core.has_work:
            self.turn()

    def _take(self, front_end: int, data: bytes) -> None:
        self.client_bytes.append(len(data))
        self.sent.append(data)

    def take_token_messages(self) -> list[int]:
        """Sizes of the messages since the last call that carried tokens."""
        sizes = []
        for data in self.sent:
            message = decode_from_core(data)
            if isinstance(message, Outputs) and message.handles:
                sizes.append(len(data))
        self.sent.clear()
        return sizes


@dataclass
class Samples:
    """What one cell measured, one entry a step unless told."""

    step_ns: list[int] = field(default_factory=list)  # schedule + update
    loop_ns: list[int] = field(default_factory=list)  # all of EngineCore.step, encoding included
    step_message_bytes: list[int] = field(default_factory=list)
    client_message_bytes: list[int] = field(default_factory=list)
    round_means: list[float] = field(default_factory=list)  # of step_ns, one entry a round


class DecodeCell:
    """So many rows that decode, and nothing else happens: neither arrivals nor ends."""

    def __init__(self, rows: int, caching: bool, together: bool, steps: int, step_s: float = SLOW_STEP_S):
        """`together`: all rows take a block in the same step; else their ends are spread over a block."""
        output = steps + 2 * WARM_UP_STEPS
        longest = 5 * BLOCK_SIZE + output
        config = ResolvedConfig(
            max_model_len=longest,
            max_num_seqs=rows,
            max_num_batched_tokens=rows * 5 * BLOCK_SIZE,  # all rows begin in the same step
            block_size=BLOCK_SIZE,
            num_blocks=rows * (longest // BLOCK_SIZE + 2) + 1,
            enable_prefix_caching=caching,
        )
        self.rows = rows
        self.samples = Samples()
        self.metered = MeteredCore(config, step_s)
        random = np.random.default_rng(rows)
        for row in range(rows):
            length = 4 * BLOCK_SIZE + (0 if together else row % BLOCK_SIZE)
            prompt = random.integers(3, VOCABULARY, length, dtype=np.int32)
            self.metered.core.receive(self.metered.request(prompt, output))
        while self.metered.core.scheduler.waiting:
            self.metered.turn()
        for _ in range(WARM_UP_STEPS):
            self.metered.turn()
        self._forget()

    def _forget(self) -> None:
        metered = self.metered
        for meter in (metered.schedule, metered.update, metered.step):
            meter.take()
        metered.take_token_messages()
        metered.worker.message_bytes.clear()

    def round(self) -> None:
        """Measure ROUND_STEPS steps."""
        metered, samples = self.metered, self.samples
        begin = len(samples.step_ns)
        for _ in range(ROUND_STEPS):
            metered.turn()
            samples.step_ns.append(sum(metered.schedule.take()) + sum(metered.update.take()))
            samples.loop_ns.append(sum(metered.step.take()))
        samples.step_message_bytes += metered.worker.message_bytes
        samples.client_message_bytes += metered.take_token_messages()
        metered.worker.message_bytes.clear()
        samples.round_means.append(float(np.mean(samples.step_ns[begin:])))
        assert metered.core.scheduler.slots.num_running == self.rows, "a row ended within the measurement"


def decode_pair(rows: int, together: bool, steps: int) -> dict[bool, Samples]:
    """A cell with caching and one without, measured in turns, so that both see the same machine."""
    cells = {caching: DecodeCell(rows, caching, together, steps) for caching in (True, False)}
    for number in range(-(-steps // ROUND_STEPS)):
        for caching in (True, False) if number % 2 else (False, True):
            cells[caching].round()
    return {caching: cell.samples for caching, cell in cells.items()}


def bursts_us(rows: int, steps: int) -> float:
    """Mean schedule+update of a step where the device is so quick that several are planned at once."""
    cell = DecodeCell(rows, True, False, steps, QUICK_STEP_S)
    for _ in range(-(-steps // ROUND_STEPS)):
        cell.round()
    return float(np.mean(cell.samples.step_ns)) / 1e3


# -------------------------------------------------------------------------------------------------------- admission


@dataclass
class Admission:
    """Medians, µs, for one prompt."""

    schedule: float  # the loop's part: add, and a step that admits less one that decodes
    receive: float  # the input thread's part: decode the message, make the request, hash
    hashing: float  # of that, naming the prompt's blocks
    encode: float  # of the step message, which carries the prompt
    message_bytes: int


def admission(tokens: int, caching: bool, full: bool, repeats: int) -> Admission:
    """Admit one request after the other into an otherwise idle core.

    `full`: every block is cached, so that each one handed out must be forgotten first.
    """
    blocks = -(-tokens // BLOCK_SIZE) + 1
    config = ResolvedConfig(
        max_model_len=2 * tokens,
        max_num_seqs=256,
        max_num_batched_tokens=2 * tokens,
        block_size=BLOCK_SIZE,
        num_blocks=1 + blocks * (8 if full else repeats + 32),
        enable_prefix_caching=caching,
    )
    metered = MeteredCore(config)
    random = np.random.default_rng(7)
    schedule, receive, message = [], [], b""
    for number in range(repeats + 16):
        prompt = random.integers(3, VOCABULARY, tokens, dtype=np.int32)
        message = metered.request(prompt, 4)
        metered.receive(message)
        metered.drain()
        steps = metered.schedule.take()
        if number >= 16:
            # The first step admits; the second decodes one row.
            schedule.append(sum(metered.add.take()) + steps[0] - steps[1])
            receive.append(metered.receive.take()[0])
        metered.add.take(), metered.receive.take()
    biggest = max(metered.worker.message_bytes)
    return Admission(
        schedule=float(np.median(schedule)) / 1e3,
        receive=float(np.median(receive)) / 1e3,
        hashing=hashing_us(message) if caching else 0.0,
        encode=encoding_us(tokens),
        message_bytes=biggest,
    )


def hashing_us(message: bytes) -> float:
    decoded = decode_to_core(message)
    assert isinstance(decoded, AddRequest)
    samples = []
    for _ in range(500):
        request = Request(decoded, 1 << 20, 0.0)
        hashing = Meter(request.hash_prompt)
        hashing(BLOCK_SIZE)
        samples += hashing.samples
    return float(np.median(samples)) / 1e3


def encoding_us(tokens: int) -> float:
    """Encoding the step message of an admission, less that of an empty one."""
    found: list[bytes] = []
    config = ResolvedConfig(
        max_model_len=2 * tokens,
        max_num_seqs=2,
        max_num_batched_tokens=2 * tokens,
        block_size=BLOCK_SIZE,
        num_blocks=4 * tokens // BLOCK_SIZE,
        enable_prefix_caching=False,
    )
    metered = MeteredCore(config)
    submit = metered.worker.submit

    def keep(step: bytes) -> "Future[None]":
        found.append(step)
        return submit(step)

    metered.worker.submit = keep  # type: ignore[method-assign]
    metered.core.receive(metered.request(np.arange(tokens, dtype=np.int32), 2))
    metered.drain()
    times = []
    for data in found[:2]:
        message, encoding = decode_step(data), Meter(encode)
        for _ in range(500):
            encoding(message)
        times.append(float(np.median(encoding.samples)))
    return (times[0] - times[1]) / 1e3


# ------------------------------------------------------------------------------------------------------- end to end


class ServingCell:
    """Random prompts served one batch after the other, the pool full of what earlier ones left in the cache."""

    INPUT, OUTPUT = 500, 200

    def __init__(self, rows: int, caching: bool):
        length = self.INPUT + self.OUTPUT
        config = ResolvedConfig(
            max_model_len=length + 1,
            max_num_seqs=rows,
            max_num_batched_tokens=2048,
            block_size=BLOCK_SIZE,
            num_blocks=1 + rows * (length // BLOCK_SIZE + 2),
            enable_prefix_caching=caching,
        )
        self._rows = rows
        self._metered = MeteredCore(config)
        self._random = np.random.default_rng(11)
        self.batch()

    def batch(self) -> "Spent":
        """Serve one batch."""
        metered = self._metered
        meters = (metered.receive, metered.step, metered.add, metered.schedule, metered.update)
        for meter in meters:
            meter.take()
        for _ in range(self._rows):
            prompt = self._random.integers(3, VOCABULARY, self.INPUT, dtype=np.int32)
            metered.receive(metered.request(prompt, self.OUTPUT))
        metered.drain()
        metered.sent.clear()
        receive, step, *scheduler = (sum(meter.take()) / 1e3 / (self._rows * self.OUTPUT) for meter in meters)
        return Spent(receive + step, sum(scheduler))


@dataclass
class Spent:
    """CPU µs for each token that came out."""

    core: float  # input thread and loop, encoding of messages included
    scheduler: float  # add, schedule, update: what a step costs, with the beginnings and ends of requests


def serving_pairs(rows: int, alternations: int) -> list[tuple[Spent, Spent]]:
    """With caching and without, in turns."""
    cells = {caching: ServingCell(rows, caching) for caching in (True, False)}
    pairs = []
    for number in range(alternations):
        found = {caching: cells[caching].batch() for caching in ((True, False) if number % 2 else (False, True))}
        pairs.append((found[True], found[False]))
    return pairs
