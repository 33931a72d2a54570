"""The EngineCore: receives requests, keeps the executor busy, sends tokens out. It never waits and knows no sockets."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from engine.clock import Clock
from engine.config import ResolvedConfig
from engine.core.adapters import AdapterBook
from engine.core.front_ends import FrontEnds
from engine.core.intake import Arrival, Intake, Refused, TextRequest, Unanswerable, refused
from engine.core.pace import Pace
from engine.core.plan import Booked, Plan
from engine.core.protocols import Executor, InlineFrontEnd
from engine.core.request import Request
from engine.core.scheduler import Scheduler
from engine.errors import INTERRUPTS, cause_of
from engine.messages import (
    HANDLE_SEQUENCE_BITS,
    Abort,
    Admitted,
    Finished,
    FinishReason,
    Outputs,
    StepResult,
    TokenLogprobs,
    Utility,
    UtilityResult,
    decode_result,
    encode,
    front_end_of,
    select_logprobs,
)

log = logging.getLogger("redline.core")

# Tokens carry the stats along; this often they are sent also while steps yield none, as in a long prefill.
STATS_PERIOD_S = 0.25


_Event = TypeVar("_Event", Finished, Admitted)


@dataclass(slots=True)
class _InFlight:
    plan: Plan
    forward: "Future[None]"
    result: "Future[bytes]"

    def outcome(self) -> bytes:
        """The encoded StepResult; raises the error of the forward pass, from which one of sampling only follows."""
        if self.forward.done():
            self.forward.result()
        return self.result.result()


class EngineCore:
    """One engine's loop body; a CoreServer owns its threads and sockets.

    `send(front_end, message)` takes an encoded FromCore. `receive()` may be called from another thread than `step()`.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        executor: Executor,
        clock: Clock,
        send: Callable[[int, bytes], None],
        front_ends: int = 1,
        inline: InlineFrontEnd | None = None,
    ) -> None:
        self.config = config
        self.scheduler = Scheduler(config)
        self._executor = executor
        self._clock = clock
        self._send = send
        self._front_ends = front_ends
        self._inline = inline
        self._stats_sent = -STATS_PERIOD_S
        self._inbox: deque[Arrival] = deque()
        self._in_flight: deque[_InFlight] = deque()
        policy = self.scheduler.policy
        self._depth = policy.steps_in_flight
        # The result that must be there before one is booked: the oldest, or where tokens come out together the newest.
        self._gate = -1 if policy.scheduler_steps > 1 else 0
        self._pace = Pace()
        self._last_step_at = clock.now()
        self._draining_until: float | None = None
        self._in_episode = False
        self._adapters = AdapterBook(
            executor, lambda: (request.adapter for request in self.scheduler.requests.values()), clock.now
        )
        self._intake = Intake(
            config, self._adapters.key, self.scheduler.refusal, clock.now, texts=self._inline is not None
        )
        self._ended_front_ends = FrontEnds()
        self._utilities: dict[str, Callable[..., Any]] = {
            "reset_prefix_cache": self.scheduler.reset_prefix_cache,
            "load_adapter": self._adapters.load,
            "unload_adapter": self._adapters.unload,
            "hold_adapter": self._adapters.hold,
            "keep_adapter": self._adapters.keep,
            "adapters": self._adapters.names,
            "drop_front_end": self._drop_front_end,
        }

    # -------------------------------------------------------------------------------------------------------- receive

    def receive(self, data: bytes) -> None:
        """Take an encoded ToCore; prompts are hashed here, which is another thread than the loop's."""
        arrival = self._intake.take(data)
        if arrival is not None:
            self._inbox.append(arrival)

    def load_adapter(self, name: str, path: str) -> "Future[Any]":
        """Have all ranks load an adapter, before the loop runs."""
        return self._adapters.load(name, path)

    @property
    def has_work(self) -> bool:
        return bool(self._inbox or self._in_flight or self.scheduler.has_work or self._adapters.holds_requests)

    @property
    def finished(self) -> bool:
        """Told to shut down, and done with what was under way."""
        return self._draining_until is not None and not self.has_work

    def next_deadline(self, now: float) -> float | None:
        """Seconds until something is due although nothing arrives; None: never."""
        due = [] if self._draining_until is None else [self._draining_until]
        if 0 < len(self._in_flight) < self._depth:
            due.append(self._pace.plan_at)
        if (release := self._adapters.next_release()) is not None:
            due.append(release)
        return min((time - now for time in due if time > now), default=None)

    # ----------------------------------------------------------------------------------------------------------- step

    def step(self, now: float) -> bool:
        """Do what can be done without waiting; False if that was nothing."""
        moved = self._take_inbox(now)
        moved |= self._book_results(now)
        if self._draining_until is not None and now >= self._draining_until:
            self._abort_all(now)
        while len(self._in_flight) < self._depth and self._is_time(now) and self._launch(now):
            moved = True
        if moved and (now - self._stats_sent >= STATS_PERIOD_S or not self.has_work):
            self._stats_sent = now
            message = encode(Outputs(at=now, stats=self.scheduler.stats(self._last_step_at)))
            for front_end in range(self._front_ends):
                self._send(front_end, message)
        return moved

    def _take_inbox(self, now: float) -> bool:
        moved = False
        done: list[Finished] = []
        if self._adapters.holds_requests:
            self._inbox.extendleft(reversed(self._adapters.released(now)))
        while self._inbox:
            moved = True
            message = self._inbox.popleft()
            if isinstance(message, Request | TextRequest):
                done += self._add(message)
            elif isinstance(message, Refused):
                done.append(_refusal(message))
            elif isinstance(message, Abort):
                done += [ended for handle in message.handles if (ended := self._abort(handle))]
            elif isinstance(message, Utility):
                self._answer(message)
            elif isinstance(message, Unanswerable):
                self._send(message.front_end, encode(message.answer))
            else:
                self._draining_until = now + message.drain_s
        self._emit(now, finished=done)
        return moved

    def _add(self, arrival: Request | TextRequest) -> list[Finished]:
        """Queue a request, unless it can't be served: its failure is its own."""
        if self._draining_until is not None:
            return [Finished(arrival.handle, FinishReason.SHUT_DOWN, error="the server is shutting down")]
        if self._ended_front_ends.is_stale(arrival.handle) or self._adapters.park(arrival):
            return []
        try:
            request = self._request(arrival)
        except INTERRUPTS:
            raise
        except BaseException as error:
            request = refused(arrival.handle, error)
        if isinstance(request, Refused):
            return [_refusal(request)]
        refusal = self.scheduler.add(request)
        return [refusal] if refusal else []

    def _request(self, arrival: Request | TextRequest) -> Request | Refused:
        """An arrival as a request under the key that its adapter has now."""
        if isinstance(arrival, TextRequest):  # V0's way: the loop itself reads the text
            assert self._inline is not None
            return self._intake.make(self._inline.add(arrival.message), arrival.arrived)
        if self._adapters.key(arrival.message.adapter) != arrival.adapter:  # unloaded while it was in the inbox
            return self._intake.make(arrival.message, arrival.arrived)
        return arrival

    def _abort(self, handle: int) -> Finished | None:
        if self._adapters.unpark(handle):
            return Finished(handle, FinishReason.ABORT)
        return self.scheduler.abort(handle)

    def _drop_front_end(self, front_end: int, first_sequence: int) -> int:
        """Abort all requests of a front end that ended; gives how many. Arguments as of `FrontEnds.ended`."""
        self._ended_front_ends.ended(front_end, first_sequence)
        handles = self._ended_front_ends.stale([*self.scheduler.requests, *self._adapters.parked])
        self._emit(self._clock.now(), finished=[ended for handle in handles if (ended := self._abort(handle))])
        return len(handles)

    def _answer(self, call: Utility) -> None:
        """Run a utility; its failure is the caller's, not the engine's."""
        method = self._utilities.get(call.method)
        if method is None:
            self._send(call.front_end, encode(UtilityResult(call.call, error=f"no utility is called {call.method!r}")))
            return
        try:
            found = method(**call.arguments)
        except Exception as error:  # the caller gets it, whatever it is
            found = Future[Any]()
            found.set_exception(error)
        if isinstance(found, Future):
            found.add_done_callback(lambda done: self._send(call.front_end, _encoded(_answer_of(call, done))))
        else:
            self._send(call.front_end, _encoded(UtilityResult(call.call, found)))

    def _is_time(self, now: float) -> bool:
        """Whether the next step is to be planned already."""
        return not self._in_flight or now >= self._pace.plan_at

    def _launch(self, now: float) -> bool:
        preemptions, lost = self.scheduler.preemptions, self.scheduler.tokens_lost
        plan = self.scheduler.schedule(now, self.scheduler.policy.burst(self._pace.decode_s))
        self._log_preemptions(self.scheduler.preemptions - preemptions, self.scheduler.tokens_lost - lost)
        if plan is None:
            return False
        if not self._in_flight:
            self._pace.begin(now, plan)
        forward = self._executor.submit(encode(plan.message))
        for step in range(plan.step, plan.step + plan.steps):
            self._in_flight.append(_InFlight(plan, forward, self._executor.sample(step)))
        return True

    def _log_preemptions(self, count: int, lost: int) -> None:
        """One line an episode: from the first preemption until a step finds every preempted request running again."""
        if count and not self._in_episode:
            log.warning(
                "preempted %d request(s), %d computed tokens lost, KV cache %.0f %% in use, %d running: "
                "raise --kv-cache-memory-bytes or lower --max-num-seqs",
                count,
                lost,
                100 * self.scheduler.pool.use,
                self.scheduler.rows.running,
            )
        if count:
            self._in_episode = True
        elif self._in_episode and not any(request.preemptions for request in self.scheduler.waiting):
            self._in_episode = False

    def _book_results(self, now: float) -> bool:
        moved = False
        while self._in_flight and self._in_flight[self._gate].result.done():
            moved = True
            flight = self._in_flight.popleft()
            result = decode_result(flight.outcome())
            self._pace.end(flight.plan, result.seconds)
            if self._in_flight:
                self._pace.begin(now, self._in_flight[0].plan)
            self._last_step_at = now
            booked = self.scheduler.update(flight.plan, result)
            self._emit(now, booked, _kept_logprobs(result, booked), booked.finished)
        return moved

    def _abort_all(self, now: float) -> None:
        ended = [self._abort(handle) for handle in [*self.scheduler.requests, *self._adapters.parked]]
        self._emit(now, finished=[one for one in ended if one])

    # ----------------------------------------------------------------------------------------------------------- send

    def _emit(
        self,
        now: float,
        booked: Booked | None = None,
        logprobs: TokenLogprobs | None = None,
        finished: list[Finished] | None = None,
    ) -> None:
        """Tell each front end what concerns its requests."""
        admitted, self.scheduler.admitted = self.scheduler.admitted, []
        finished = finished or []
        handles = booked.handles if booked else np.empty(0, np.int64)
        scored = booked.prompt_logprobs if booked else ()
        if not (len(handles) or admitted or finished or scored):
            return
        owners = handles >> HANDLE_SEQUENCE_BITS
        front_ends = set(np.unique(owners).tolist())
        front_ends |= {front_end_of(one.handle) for one in admitted} | {front_end_of(one.handle) for one in finished}
        front_ends |= {front_end_of(one.owner) for one in scored}
        for front_end in sorted(front_ends):
            mine = owners == front_end
            tokens, counts = mine, b""
            if booked is not None and booked.counts is not None:
                tokens, counts = np.repeat(mine, booked.counts), booked.counts[mine].tobytes()
            message = Outputs(
                at=now,
                handles=handles[mine].tobytes(),
                tokens=booked.tokens[tokens].tobytes() if booked else b"",
                counts=counts,
                finished=_of(front_end, finished),
                admitted=_of(front_end, admitted),
                logprobs=select_logprobs(logprobs, tokens) if logprobs else None,
                stats=self.scheduler.stats(self._last_step_at),
                prompt_logprobs=tuple(one for one in scored if front_end_of(one.owner) == front_end),
            )
            if self._inline is not None:
                message = self._write_texts(message)
            self._send(front_end, encode(message))

    def _write_texts(self, message: Outputs) -> Outputs:
        """V0's way: the loop itself writes the text, and ends requests whose stop string came."""
        assert self._inline is not None
        written, stopped = self._inline.outputs(message)
        for handle in stopped:
            self.scheduler.abort(handle)  # the text says so already
        return written


def _answer_of(call: Utility, done: "Future[Any]") -> UtilityResult:
    if done.cancelled():
        return UtilityResult(call.call, error="the engine is shutting down")
    error = done.exception()
    if error is None:
        return UtilityResult(call.call, done.result())
    return UtilityResult(call.call, error=cause_of(error))


def _encoded(answer: UtilityResult) -> bytes:
    try:
        return encode(answer)
    except Exception as error:  # the caller waits for some answer
        return encode(UtilityResult(answer.call, error=f"the answer can't be sent: {cause_of(error)}"))


def _refusal(refused: Refused) -> Finished:
    return Finished(refused.handle, refused.reason, error=refused.cause)


def _of(front_end: int, events: Sequence[_Event]) -> tuple[_Event, ...]:
    return tuple(event for event in events if front_end_of(event.handle) == front_end)


def _kept_logprobs(result: StepResult, booked: Booked) -> TokenLogprobs | None:
    if result.logprobs is None or booked.kept.all():
        return result.logprobs
    return select_logprobs(result.logprobs, booked.kept)
