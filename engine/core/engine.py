"""The EngineCore: receives requests, keeps the executor busy, sends tokens out. It never waits and has no sockets."""

import contextlib
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from engine.clock import Clock
from engine.core.adapters import AdapterRegistry
from engine.core.feature_mirror import FeatureMirror, MirrorMissError
from engine.core.front_ends import EndedFrontEnds
from engine.core.grammars import GrammarManager
from engine.core.intake import Arrival, Intake, RejectedCall, RejectedRequest, TextRequest, reject
from engine.core.pooling_scheduler import make_scheduler
from engine.core.protocols import Executor, InlineFrontEnd
from engine.core.publisher import OutputPublisher
from engine.core.request import Request
from engine.core.step_timer import StepTimer
from engine.core.steps import ScheduledStep, StepOutcome
from engine.errors import INTERRUPTS, cause_of
from engine.logprob_columns import TokenLogprobs, select_logprobs
from engine.messages import (
    Abort,
    AddRequest,
    Finished,
    FinishReason,
    FreeFeatures,
    Shutdown,
    StepResult,
    Utility,
    UtilityResult,
    decode_result,
    encode,
)
from engine.resolved_config import ResolvedConfig

log = logging.getLogger("redline.core")


@dataclass(slots=True)
class _InFlight:
    step: ScheduledStep
    number: int  # of the step; a burst has several
    forward: "Future[None]"
    result: "Future[bytes] | None" = None  # None: it waits for the tokens of the step before it, to make its masks

    @property
    def is_done(self) -> bool:
        return self.result is not None and self.result.done()

    def outcome(self) -> bytes:
        """The encoded StepResult. The error of the forward pass is raised first, since it also fails the sampling."""
        if self.forward.done():
            self.forward.result()
        assert self.result is not None, f"step {self.number} was not sampled"
        return self.result.result()


class EngineCore:
    """One engine's loop body; a CoreServer owns its threads and sockets.

    `send(front_end, message)` takes an encoded FromCore. `receive()` may be called from another thread than `step()`.
    `features` is the mirror of the front ends' feature caches; without it multimodal inputs are used as they come.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        executor: Executor,
        clock: Clock,
        send: Callable[[int, bytes], None],
        front_ends: int = 1,
        inline: InlineFrontEnd | None = None,
        features: FeatureMirror | None = None,
        grammars: GrammarManager | None = None,
    ) -> None:
        self.config = config
        self.scheduler = scheduler = make_scheduler(config, features)
        self._features = scheduler.features
        self._has_mirror = features is not None
        self._grammars = grammars or GrammarManager()
        self._executor = executor
        self._clock = clock
        self._send = send
        self._inline = inline
        self._inbox: deque[Arrival] = deque()
        self._in_flight: deque[_InFlight] = deque()
        self._max_in_flight = scheduler.policy.steps_in_flight
        # Index of the result that must have arrived before the oldest is booked: the oldest itself, or the newest if
        # results are booked together.
        self._awaited = -1 if scheduler.policy.bursts.results_together else 0
        self._timer = StepTimer()
        texts = inline if inline is not None and inline.detokenizes else None
        self._publisher = OutputPublisher(scheduler, send, front_ends, texts, clock.now())
        self._draining_until: float | None = None
        self._is_preempting = False
        self._adapters = AdapterRegistry(executor, scheduler.requests, clock.now)
        self._intake = Intake(
            config, self._adapters.key, scheduler.request_error, clock.now, tokenizes_inline=texts is not None
        )
        self._ended_front_ends = EndedFrontEnds()
        self._utilities: dict[str, Callable[..., Any]] = {
            "reset_prefix_cache": scheduler.reset_prefix_cache,
            "load_adapter": self._adapters.load,
            "unload_adapter": self._adapters.unload,
            "hold_adapter": self._adapters.hold,
            "keep_adapter": self._adapters.cancel_hold,
            "adapters": self._adapters.names,
            "drop_front_end": self._drop_front_end,
            "check_grammar": self._grammars.check,
        }

    def receive(self, data: bytes) -> None:
        """Put an encoded ToCore into the inbox. Prompts are hashed here, so that the loop's thread doesn't have to."""
        arrival = self._intake.read(data)
        if arrival is not None:
            self._inbox.append(arrival)

    def load_adapter(self, name: str, path: str) -> "Future[Any]":
        """Load an adapter on all ranks, before the loop runs."""
        return self._adapters.load(name, path)

    @property
    def has_work(self) -> bool:
        return bool(self._inbox or self._in_flight or self.scheduler.has_work or self._parked)

    @property
    def finished(self) -> bool:
        """Whether a shutdown was requested and nothing is left to do."""
        return self._draining_until is not None and not self.has_work

    def next_deadline(self, now: float) -> float | None:
        """Seconds until `step` has something to do even if nothing arrives; None: never."""
        due = [] if self._draining_until is None else [self._draining_until]
        if 0 < len(self._in_flight) < self._max_in_flight:
            due.append(self._timer.next_schedule_at)
        if (release := self._adapters.next_release()) is not None:
            due.append(release)
        return min((time - now for time in due if time > now), default=None)

    # ----------------------------------------------------------------------------------------------------------- step

    def step(self, now: float) -> bool:
        """One turn of the loop: everything that can be done without waiting; False if that was nothing."""
        scheduler = self.scheduler
        moved = self._receive_arrivals(now)
        while self._has_result():
            outcome, logprobs = self._book_result(now)
            # Sent before the next step is scheduled, so that tokens don't wait for that.
            self._publisher.publish(now, outcome.finished, outcome, logprobs)
            self._sample_next(now)
            moved = True
        self._end_drain(now)
        while self._may_schedule(now) and (step := self._schedule_step(now)) is not None:
            self._submit_step(step, now)
            moved = True
        if self._features.has_unneeded:
            steps = scheduler.counters.steps
            self._features.unlink_unneeded(steps, steps - len(self._in_flight))
        if moved and (self._publisher.stats_are_due(now) or not self.has_work):
            self._publisher.publish_stats(now)
        return moved

    def _has_result(self) -> bool:
        return bool(self._in_flight) and self._in_flight[self._awaited].is_done

    def _book_result(self, now: float) -> tuple[StepOutcome, TokenLogprobs | None]:
        """Book the oldest result; also returns the logprobs of the tokens that count."""
        done = self._in_flight.popleft()
        result = decode_result(done.outcome())
        self._timer.finish_step(done.step, result.seconds)
        if self._in_flight:
            self._timer.start_step(now, self._in_flight[0].step)
        self._publisher.last_step_at = now
        outcome = self.scheduler.update(done.step, result)
        return outcome, _kept_logprobs(result, outcome)

    def _end_drain(self, now: float) -> None:
        """Abort all requests once the time to finish them is over."""
        if self._draining_until is None or now < self._draining_until:
            return
        ended = [self._abort(handle) for handle in [*self.scheduler.requests, *self._parked]]
        self._publisher.publish(now, [one for one in ended if one])

    def _may_schedule(self, now: float) -> bool:
        """Whether another step may be submitted now; see `engine.core.step_timer`."""
        in_flight = len(self._in_flight)
        return in_flight < self._max_in_flight and (
            in_flight < self.config.pipeline_stages or now >= self._timer.next_schedule_at
        )

    def _schedule_step(self, now: float) -> ScheduledStep | None:
        scheduler = self.scheduler
        counters = scheduler.counters
        preemptions, lost_tokens = counters.num_preemptions, counters.num_lost_tokens
        step = scheduler.schedule(now, scheduler.policy.bursts.max_steps(self._timer.decode_step_s))
        self._log_preemptions(counters.num_preemptions - preemptions, counters.num_lost_tokens - lost_tokens)
        return step

    def _submit_step(self, step: ScheduledStep, now: float) -> None:
        if not self._in_flight:
            self._timer.start_step(now, step)
        forward = self._executor.submit(encode(step.message))
        for number in range(step.step, step.step + step.num_steps):
            self._in_flight.append(_InFlight(step, number, forward))
            self._sample_next(now)

    def _sample_next(self, now: float) -> None:
        """Sample the newest step, unless slots with a grammar sample in it and earlier steps are in flight.

        Its masks need their tokens. Meanwhile the workers compute its forward pass. With pipeline stages these tokens
        are known, since no slot decodes ahead of them.
        """
        newest = self._in_flight[-1] if self._in_flight else None
        if newest is None or newest.result is not None:
            return
        slots, masks = self.scheduler.slots, b""
        if slots.constrained[newest.step.slots].any():
            if len(self._in_flight) > 1 and self.scheduler.policy.decodes_ahead:
                return
            masks, ended = self._grammars.masks(slots, newest.step)
            if ended:
                self._publisher.publish(now, [self.scheduler.end(*one) for one in ended])
        newest.result = self._executor.sample(newest.number, masks)

    def _log_preemptions(self, count: int, lost_tokens: int) -> None:
        """Log one line per episode: from the first preemption until all preempted requests run again."""
        if count and not self._is_preempting:
            log.warning(
                "preempted %d request(s), %d computed tokens lost, KV cache %.0f %% in use, %d running: "
                "raise --kv-cache-memory-bytes or lower --max-num-seqs",
                count,
                lost_tokens,
                100 * self.scheduler.pool.usage,
                self.scheduler.slots.num_running,
            )
        if count:
            self._is_preempting = True
        elif self._is_preempting and not any(request.num_preemptions for request in self.scheduler.waiting):
            self._is_preempting = False

    # ------------------------------------------------------------------------------------------------------- arrivals

    def _receive_arrivals(self, now: float) -> bool:
        """Handle everything in the inbox."""
        moved = False
        ended: list[Finished] = []
        if self._adapters.has_parked:
            self._inbox.extendleft(reversed(self._adapters.take_released(now)))
        if self._grammars.parked:
            self._inbox.extendleft(reversed(self._grammars.take_ready()))
        while self._inbox:
            moved = True
            arrival = self._inbox.popleft()
            if isinstance(arrival, Request | TextRequest):
                mirrored = self._has_mirror and (arrival.message.mm_inputs or arrival.message.unplaced)
                ended += self._add_with_inputs(arrival) if mirrored else self._add(arrival)
            elif isinstance(arrival, RejectedRequest):
                ended.append(arrival.as_finished())
                if self._has_mirror and arrival.message is not None:
                    self._mirror_rejected(arrival.message)
            elif isinstance(arrival, Abort):
                ended += [one for handle in arrival.handles if (one := self._abort(handle))]
            elif isinstance(arrival, Utility):
                self._run_utility(arrival)
            elif isinstance(arrival, FreeFeatures):
                if not self._ended_front_ends.is_stale(arrival.sender):
                    self._features.free(arrival)
            elif isinstance(arrival, RejectedCall):
                self._send(arrival.front_end, encode(arrival.answer))
            else:
                self._receive_other(arrival, now)
        self._publisher.publish(now, ended)
        return moved

    def _receive_other(self, arrival: Arrival, now: float) -> None:
        assert isinstance(arrival, Shutdown), "this core exchanges no blocks with others"
        self._draining_until = now + arrival.drain_s

    def _add(self, arrival: Request | TextRequest) -> list[Finished]:
        """Queue a request. An error ends this request only."""
        if self._draining_until is not None:
            return [Finished(arrival.handle, FinishReason.SHUT_DOWN, error="the server is shutting down")]
        if self._ended_front_ends.is_stale(arrival.handle) or self._adapters.park(arrival):
            return []
        try:
            if self._grammars.park(arrival):
                return []
            request = self._to_request(arrival)
            if isinstance(request, Request):
                self._grammars.attach(request)
        except INTERRUPTS:
            raise
        except BaseException as error:
            request = reject(arrival.handle, error)
        rejected = request.as_finished() if isinstance(request, RejectedRequest) else self._queue(request)
        return [rejected] if rejected else []

    def _queue(self, request: Request) -> Finished | None:
        return self.scheduler.add(request)

    def _add_with_inputs(self, arrival: Request | TextRequest) -> list[Finished]:
        """Queue a request with multimodal inputs, whose features stay in the mirror even if it can't be served."""
        handle = arrival.handle
        if self._ended_front_ends.is_stale(handle):
            self._features.reject(arrival.message)
            return []
        try:
            arrival.message = self._features.add(arrival.message)
        except MirrorMissError as error:
            log.error("request %d: %s", handle, error)
            return [Finished(handle, FinishReason.FAILED, error=str(error))]
        ended = self._add(arrival)
        if handle not in self.scheduler.requests and handle not in self._parked:
            self._features.release(handle)
        return ended

    def _mirror_rejected(self, message: AddRequest) -> None:
        """Register the features of a request that can't be served, since its front end counts on them from now on."""
        if self._ended_front_ends.is_stale(message.handle):
            self._features.reject(message)
            return
        with contextlib.suppress(MirrorMissError):
            self._features.add(message)
        self._features.release(message.handle)

    def _to_request(self, arrival: Request | TextRequest) -> Request | RejectedRequest:
        """The request of an arrival, under the current key of its adapter."""
        if isinstance(arrival, TextRequest):  # V0: the loop itself tokenizes
            assert self._inline is not None
            message = arrival.message
            if message.unplaced and not message.mm_inputs:
                message = self._inline.process(message)
                self._features.hold_own(message.handle, [one.features for one in message.mm_inputs])
            return self._intake.make_request(self._inline.add(message), arrival.arrived)
        if self._adapters.key(arrival.message.adapter) != arrival.adapter:  # unloaded while it was in the inbox
            return self._intake.make_request(arrival.message, arrival.arrived)
        return arrival

    @property
    def _parked(self) -> list[int]:
        """The handles of requests that wait for an adapter or for their grammar."""
        return self._adapters.parked + self._grammars.parked

    def _abort(self, handle: int) -> Finished | None:
        if self._adapters.unpark(handle) or self._grammars.unpark(handle):
            self._features.release(handle)
            return Finished(handle, FinishReason.ABORT)
        return self.scheduler.abort(handle)

    def _drop_front_end(self, front_end: int, first_sequence: int) -> int:
        """Abort all requests of a front end that ended; returns how many. Args as of `EndedFrontEnds.add`."""
        self._ended_front_ends.add(front_end, first_sequence)
        handles = self._ended_front_ends.find_stale([*self.scheduler.requests, *self._parked])
        self._publisher.publish(self._clock.now(), [one for handle in handles if (one := self._abort(handle))])
        self._features.drop_stale(self._ended_front_ends.is_stale)
        return len(handles)

    def _run_utility(self, call: Utility) -> None:
        """Run a utility and answer its caller. An error ends this call only."""
        method = self._utilities.get(call.method)
        if method is None:
            self._send(call.front_end, encode(UtilityResult(call.call, error=f"no utility is called {call.method!r}")))
            return
        try:
            result = method(**call.arguments)
        except Exception as error:  # the caller receives any error
            result = Future[Any]()
            result.set_exception(error)
        if isinstance(result, Future):
            result.add_done_callback(lambda done: self._send(call.front_end, _encode_answer(_answer_of(call, done))))
        else:
            self._send(call.front_end, _encode_answer(UtilityResult(call.call, result)))


def _answer_of(call: Utility, done: "Future[Any]") -> UtilityResult:
    if done.cancelled():
        return UtilityResult(call.call, error="the engine is shutting down")
    error = done.exception()
    if error is None:
        return UtilityResult(call.call, done.result())
    return UtilityResult(call.call, error=cause_of(error))


def _encode_answer(answer: UtilityResult) -> bytes:
    try:
        return encode(answer)
    except Exception as error:  # the caller waits for an answer
        return encode(UtilityResult(answer.call, error=f"the answer can't be sent: {cause_of(error)}"))


def _kept_logprobs(result: StepResult, outcome: StepOutcome) -> TokenLogprobs | None:
    if result.logprobs is None or outcome.kept.all():
        return result.logprobs
    return select_logprobs(result.logprobs, outcome.kept)
