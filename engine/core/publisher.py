"""Sends the outputs of requests to the front ends that own them."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from engine.core.protocols import InlineFrontEnd
from engine.core.scheduler import Scheduler
from engine.core.steps import StepOutcome
from engine.logprob_columns import TokenLogprobs, select_logprobs
from engine.messages import HANDLE_SEQUENCE_BITS, Admitted, Finished, Outputs, encode, front_end_of
from engine.pooling import Pooled

# Messages with tokens also contain the stats. While steps yield no tokens, as in a long prefill, stats are sent with
# this period.
STATS_PERIOD_S = 0.25

_Event = TypeVar("_Event", Finished, Admitted, Pooled)


class OutputPublisher:
    """Sends one `Outputs` message per front end and event, encoded, with `send(front_end, data)`."""

    def __init__(
        self,
        scheduler: Scheduler,
        send: Callable[[int, bytes], None],
        num_front_ends: int,
        inline: InlineFrontEnd | None,
        now: float,
    ):
        self._scheduler = scheduler
        self._send = send
        self._num_front_ends = num_front_ends
        self._inline = inline
        self._stats_sent = -STATS_PERIOD_S
        self.last_step_at = now  # when the last result was booked

    def publish(
        self,
        now: float,
        finished: Sequence[Finished],
        outcome: StepOutcome | None = None,
        logprobs: TokenLogprobs | None = None,
    ) -> None:
        """Send each front end the tokens, ends and admissions of its requests.

        Args:
            now: the core's clock.
            finished: requests that ended.
            outcome: of a step's result, if there is one.
            logprobs: of the outcome's tokens.
        """
        admitted, self._scheduler.admitted = self._scheduler.admitted, []
        handles = outcome.handles if outcome else np.empty(0, np.int64)
        scored = outcome.prompt_logprobs if outcome else ()
        if not (len(handles) or admitted or finished or scored):
            return
        owners = handles >> HANDLE_SEQUENCE_BITS
        front_ends = set(np.unique(owners).tolist())
        front_ends |= {front_end_of(one.handle) for one in admitted} | {front_end_of(one.handle) for one in finished}
        front_ends |= {front_end_of(one.owner) for one in scored}
        for front_end in sorted(front_ends):
            own = owners == front_end
            tokens, counts = own, b""
            if outcome is not None and outcome.counts is not None:
                tokens, counts = np.repeat(own, outcome.counts), outcome.counts[own].tobytes()
            message = Outputs(
                at=now,
                handles=handles[own].tobytes(),
                tokens=outcome.tokens[tokens].tobytes() if outcome else b"",
                counts=counts,
                finished=_events_of(front_end, finished),
                admitted=_events_of(front_end, admitted),
                logprobs=select_logprobs(logprobs, tokens) if logprobs else None,
                stats=self._scheduler.stats(self.last_step_at),
                prompt_logprobs=tuple(one for one in scored if front_end_of(one.owner) == front_end),
                pooled=_events_of(front_end, outcome.pooled) if outcome else (),
            )
            if self._inline is not None:
                message = self._add_texts(self._inline, message)
            self._send(front_end, encode(message))

    def _add_texts(self, inline: InlineFrontEnd, message: Outputs) -> Outputs:
        """V0: the loop itself detokenizes, and aborts requests that a stop string ended."""
        with_texts, stopped = inline.outputs(message)
        for handle in stopped:
            self._scheduler.abort(handle)  # the message has its end already
        return with_texts

    def stats_are_due(self, now: float) -> bool:
        return now - self._stats_sent >= STATS_PERIOD_S

    def publish_stats(self, now: float) -> None:
        """Send the stats to all front ends."""
        self._stats_sent = now
        message = encode(Outputs(at=now, stats=self._scheduler.stats(self.last_step_at)))
        for front_end in range(self._num_front_ends):
            self._send(front_end, message)


def _events_of(front_end: int, events: Sequence[_Event]) -> tuple[_Event, ...]:
    return tuple(event for event in events if front_end_of(event.handle) == front_end)
