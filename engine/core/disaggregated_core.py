"""The core of a replica with prefill/decode disaggregation: it sends the blocks of prompts, or waits for them.

What a request needs is in its message, not in the core: a prefill replica also serves whole requests while no decode
replica lives, and a decode replica computes what it does not get.

Blocks are copied by the ranks, in the order of steps. Those to send are copied out by a step that computes nothing,
right after the step that fills them, so that they don't wait for the next forward pass. Those that arrived are copied
in by the step that admits their request.
"""

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
from msgspec.structs import asdict

from engine.columns import column
from engine.core.disaggregated_scheduler import DisaggregatedScheduler
from engine.core.engine import EngineCore
from engine.core.incoming_blocks import ArrivedBlocks
from engine.core.intake import Arrival
from engine.core.outgoing_blocks import Shipment
from engine.core.request import Request
from engine.core.steps import ScheduledStep, StepOutcome
from engine.kv_transfer import WAIT_FOR_RANKS, PrefillEnded
from engine.logprob_columns import TokenLogprobs
from engine.messages import COPY_OUT, CopyingStep, Finished, FinishReason, Outputs, encode, front_end_of


class DisaggregatedCore(EngineCore):
    """Of a prefill replica two functions are set before the first request.

    send_blocks: sends a shipment, once that is in its host blocks.
    link_fault: why nothing can be sent to an address for now; empty: it can.
    """

    scheduler: DisaggregatedScheduler
    send_blocks: Callable[[Shipment], None]
    link_fault: Callable[[str], str]

    def __init__(self, *args: Any, **options: Any):
        """Arguments as of EngineCore."""
        super().__init__(*args, **options)
        self._num_copies = 0  # steps that only copy
        self._copying: deque[Future[Any]] = deque()  # their results
        self._copied_in: deque[tuple[int, list[int]]] = deque()  # the numbers of steps, and host blocks that they read

    def receive_blocks(self, arrived: ArrivedBlocks) -> None:
        """Put the report of the receiving thread into the inbox. May be called from any thread."""
        self._inbox.append(arrived)

    def step(self, now: float) -> bool:
        """See EngineCore. An error of a copy is raised here."""
        while self._copying and self._copying[0].done():
            self._copying.popleft().result()
        self.scheduler.incoming.expire(now)
        moved = super().step(now)
        if not self.scheduler.has_freed_slots:  # otherwise workers don't know yet which slots are idle
            self._copy_out()
        return moved

    def next_deadline(self, now: float) -> float | None:
        """See EngineCore."""
        wait, expires = super().next_deadline(now), self.scheduler.incoming.next_deadline
        if expires == math.inf:
            return wait
        left = max(0.0, expires - now)
        return left if wait is None else min(wait, left)

    # ------------------------------------------------------------------------------------------------------- arrivals

    def _receive_arrivals(self, now: float) -> bool:
        moved = super()._receive_arrivals(now)
        incoming = self.scheduler.incoming
        ended = [one for request in incoming.take_released() if (one := self._queue_released(request))]
        self._publisher.publish(now, ended)
        for wanted in incoming.take_wanted(now):
            self._send(front_end_of(wanted.handle), encode(Outputs(at=now, prefills=(wanted,))))
            moved = True
        return moved

    def _receive_other(self, arrival: Arrival, now: float) -> None:
        if isinstance(arrival, ArrivedBlocks):
            self.scheduler.incoming.arrive(arrival, now)
        elif isinstance(arrival, PrefillEnded):
            self.scheduler.incoming.end(arrival, now)
        else:
            super()._receive_other(arrival, now)

    def _queue(self, request: Request) -> Finished | None:
        if request.message.remote_prefill and self.scheduler.wait_for_blocks(request):
            return None
        push = request.message.push
        if push is not None and (cause := self.link_fault(push.address)):
            return Finished(request.handle, FinishReason.UNREACHABLE, error=cause)
        rejected = super()._queue(request)
        if rejected is None and push is not None:
            self.scheduler.push_blocks(request)
        return rejected

    def _queue_released(self, request: Request) -> Finished | None:
        """Queue a request that waits for blocks no longer."""
        if self._adapters.key(request.message.adapter) == request.adapter:
            rejected = super()._queue(request)
        else:
            cause = f"no adapter called {request.message.adapter!r} is served"
            rejected = Finished(request.handle, FinishReason.NOT_SERVED, error=cause)
        if rejected is not None:
            self.scheduler.incoming.remove(request.handle)
            self._features.release(request.handle)
        return rejected

    @property
    def _parked(self) -> list[int]:
        return super()._parked + self.scheduler.incoming.waiting

    def _abort(self, handle: int) -> Finished | None:
        if self.scheduler.incoming.remove(handle) is None:
            return super()._abort(handle)
        self._features.release(handle)
        return Finished(handle, FinishReason.ABORT)

    # ---------------------------------------------------------------------------------------------------------- steps

    def _submit_step(self, step: ScheduledStep, now: float) -> None:
        copies, copied_in = self.scheduler.take_copies()
        if copies:
            step.message = CopyingStep(**asdict(step.message), block_copies=column(copies))
        if copied_in:
            self._copied_in.append((step.step, copied_in))
        super()._submit_step(step, now)
        self._copy_out()

    def _book_result(self, now: float) -> tuple[StepOutcome, TokenLogprobs | None]:
        number = self._in_flight[0].number
        booked = super()._book_result(now)
        while self._copied_in and self._copied_in[0][0] <= number:
            self.scheduler.incoming.give_back(self._copied_in.popleft()[1])
        return booked

    def _copy_out(self) -> None:
        """Copy out what the submitted steps compute, before another step overwrites it."""
        if self._in_flight and self._in_flight[-1].result is None:  # a step that waits for masks is not sampled yet
            return
        slots = self.scheduler.slots
        for shipment in self.scheduler.outgoing.take_due(self.scheduler.pool.block_of, self.scheduler.requests):
            self._num_copies += 1
            message = CopyingStep(
                step=-self._num_copies,  # no number of a step that computes
                chunks=column([(slot, 0) for slot in np.flatnonzero(slots.live).tolist()]),
                block_copies=column(
                    [(COPY_OUT, *pair) for pair in zip(shipment.blocks, shipment.host_blocks, strict=True)]
                ),
            )
            self._executor.submit(encode(message))
            copied = self._executor.sample(message.step)
            everywhere = self._executor.call(WAIT_FOR_RANKS, {})  # only one rank reports that it has copied
            self._copying += (copied, everywhere)
            everywhere.add_done_callback(partial(self._on_ranks_done, copied, shipment))

    def _on_ranks_done(self, copied: "Future[Any]", shipment: Shipment, everywhere: "Future[Any]") -> None:
        copied.add_done_callback(partial(self._send_copied, everywhere, shipment))

    def _send_copied(self, everywhere: "Future[Any]", shipment: Shipment, copied: "Future[Any]") -> None:
        """Send blocks that are copied; an error is raised by `step`."""
        if not any(one.cancelled() or one.exception() for one in (copied, everywhere)):
            self.send_blocks(shipment)
