"""An executor on a latency model: it computes when each step would end, and makes tokens without a model."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.children import RankHandle
from engine.clock import Clock
from engine.columns import column, int32s
from engine.hardware.description import HostCosts
from engine.hardware.step_time import StepTime, StepWork
from engine.hardware.tokens import make_tokens
from engine.messages import MemoryLine, StepMessage, StepReports, StepResult, decode_step, encode


@dataclass(frozen=True, slots=True)
class SimulatedHost:
    """The host's part of a step: with `overlaps`, it prepares the next step while the device computes one."""

    costs: HostCosts
    ranks: int
    overlaps: bool

    def with_host(self, device_s: float, requests: int, new: int = 0) -> float:
        """Seconds from the end of one step to the end of the next, which takes the device `device_s`.

        Args:
            requests: in the step.
            new: admitted by it.
        """
        host = self.costs.step_seconds(requests, self.ranks)
        device_s += new * self.costs.admitted_ms * 1e-3
        return max(device_s, host) + self.costs.serial * host if self.overlaps else device_s + host


class SimulatedExecutor:
    """Implements `engine.worker.executor.StartedExecutor`; `pump` delivers the results that are due."""

    def __init__(
        self,
        clock: Clock,
        step_time: StepTime,
        host: SimulatedHost,
        max_num_seqs: int,
        vocab_size: int,
        tokens: str = "random",
    ):
        """`tokens` is one of `engine.config.SIMULATED_TOKENS`."""
        self.seconds: dict[str, float] = {}
        self.kernels = "simulated"
        self.warnings: tuple[str, ...] = ()
        self.num_blocks: int | None = None
        self.memory: tuple[MemoryLine, ...] = ()
        self.ended: Future[None] = Future()
        self.ranks: Sequence[RankHandle] = ()
        self.real_time = False  # the core takes time itself
        self._clock, self._step_time, self._host = clock, step_time, host
        self._tokens = make_tokens(tokens, max_num_seqs, vocab_size)
        self._live = np.zeros(max_num_seqs, bool)
        self._computed = np.zeros(max_num_seqs, np.int64)
        self._known = np.zeros(max_num_seqs, np.int64)
        self._inputs: dict[int, list[int]] = {}  # by slot: tokens of each of its images
        self._busy_until = 0.0
        self._results: dict[int, tuple[float, bytes]] = {}  # of steps that weren't sampled yet: seconds, encoded result
        self._due: deque[tuple[float, bytes, Future[bytes]]] = deque()

    def submit(self, step: bytes) -> "Future[None]":
        message = decode_step(step)
        self._apply(message)
        for one in (message, *message.later_steps()):
            self._results[one.step] = self._run(one)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def sample(self, step: int, masks: bytes = b"") -> "Future[bytes]":  # noqa: ARG002 - tokens follow no grammar
        seconds, encoded = self._results.pop(step)
        self._busy_until = max(self._busy_until, self._clock.now() - self._covered_s()) + seconds
        result: Future[bytes] = Future()
        self._due.append((self._busy_until, encoded, result))
        return result

    def _covered_s(self) -> float:
        """Real time: the part of the host's cost of a step that the core has spent when it submits the step."""
        if not self.real_time:
            return 0.0
        cost = self._host.costs.step_seconds(int(self._live.sum()), self._host.ranks)
        return cost * self._host.costs.serial if self._host.overlaps else cost

    def call(self, method: str, arguments: dict[str, Any]) -> "Future[Any]":
        raise NotImplementedError(f"simulated hardware has no {method}")

    def shutdown(self) -> None:
        self._due.clear()

    def occupy(self, seconds: float) -> None:
        """The engine's loop does something else for a time, e.g. process an image: the next step waits for it."""
        self._busy_until = max(self._busy_until, self._clock.now()) + seconds

    @property
    def next_due(self) -> float | None:
        """When the next result is due; None if no step is in flight."""
        return self._due[0][0] if self._due else None

    def pump(self) -> bool:
        """Deliver what is due by now; whether anything was."""
        now, delivered = self._clock.now(), False
        while self._due and self._due[0][0] <= now:
            _, encoded, result = self._due.popleft()
            result.set_result(encoded)
            delivered = True
        return delivered

    def _apply(self, message: StepMessage) -> None:
        freed = int32s(message.freed_slots)
        self._live[freed] = False
        self._tokens.free(freed)
        for added in message.assigned_slots:
            self._live[added.slot] = True
            self._known[added.slot] = len(int32s(added.tokens))
            self._computed[added.slot] = added.num_computed_tokens
            self._tokens.assign(added)
            if added.mm_inputs:
                self._inputs[added.slot] = [one.length for one in added.mm_inputs]

    def _run(self, message: StepMessage) -> tuple[float, bytes]:
        counts = self._live.astype(np.int64)
        if message.chunks:
            chunks = int32s(message.chunks, 2)
            counts[chunks[:, 0]] = chunks[:, 1]
        before = self._computed
        self._computed = before + counts
        sampling = (counts > 0) & (self._computed == self._known)
        self._known[sampling] += 1
        slots = np.flatnonzero(sampling)
        single = counts == 1
        work = StepWork(
            decodes=int(single.sum()),
            context=int(self._computed[single].sum()),
            chunks=[(int(counts[slot]), int(before[slot])) for slot in np.flatnonzero(counts > 1)],
            sampled=len(slots),
            images=[self._inputs[slot][number] for slot, number in message.encoder_inputs],
        )
        device_s = self._step_time.seconds(work)
        tokens = self._tokens.next(slots, self._known[slots])
        encoded = tuple("" for _ in message.encoder_inputs)
        result = StepResult(
            message.step, column(tokens), seconds=device_s, reports=StepReports(encoded=encoded) if encoded else None
        )
        new = len(message.assigned_slots)
        return self._host.with_host(device_s, int((counts > 0).sum()), new), encode(result)
