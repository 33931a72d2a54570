"""What an engine client reports to its owner: outputs that ended, and the death of a core."""

import msgspec

from engine.frontend.streams import Output
from engine.messages import Finished


class OutputRecord(msgspec.Struct):
    """One finished output, as a line of the request log has it; times in seconds."""

    request: str
    index: int  # of the output within its request
    model: str
    client: str
    front_end: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    finish_reason: str
    ttft_s: float | None  # None: it had no token
    itl_s: float | None  # mean; None: it had fewer than two tokens
    e2e_s: float
    queue_s: float
    preemptions: int = 0
    error: str | None = None
    replica: int = 0
    # When it was preempted, and when it got a slot again, in seconds since its arrival.
    preempted: tuple[tuple[float, float], ...] = ()
    trace: dict[str, str] = {}  # the headers of the client's trace (W3C), if it sent them
    admitted: bool = True  # whether it got a slot

    @classmethod
    def of_output(cls, output: Output, reason: str, now: float, front_end: int, replica: int) -> "OutputRecord":
        """The record of an output that ends at `now`, without what only the core knows (preemptions, error)."""
        stream = output.stream
        gaps = output.count - 1
        return cls(
            request=stream.origin.request,
            index=output.index,
            model=stream.origin.model,
            client=stream.origin.client,
            front_end=front_end,
            prompt_tokens=stream.prompt_lengths[output.prompt],
            cached_tokens=output.cached_tokens,
            output_tokens=output.count,
            finish_reason=reason,
            ttft_s=_rounded(output.ttft_s) if output.count else None,
            itl_s=_rounded((output.last_at - output.first_at) / gaps) if gaps > 0 else None,
            e2e_s=_rounded(now - stream.arrived),
            queue_s=_rounded(output.waited_s),
            replica=replica,
            trace=stream.origin.trace,
            admitted=output.was_admitted,
        )

    def complete(self, finished: Finished, arrived: float) -> None:
        """Add what only the core knows; `arrived` is when the request came."""
        self.preemptions = finished.preemptions
        self.preempted = tuple(
            (_rounded(begin - arrived), _rounded(end - arrived)) for begin, end in finished.preempted
        )


class ClientListener:
    """Notified by an engine client, within its event loop. The methods of this class do nothing."""

    @property
    def wants_records(self) -> bool:
        """Whether `output_recorded` is to be called; without it no records are made."""
        return False

    def output_ended(self, output: Output, reason: str) -> None:
        """An output ended with a reason of `engine.frontend.front_end_stats.REASONS`."""

    def output_recorded(self, record: OutputRecord) -> None:
        """An output ended, and the core has reported its preemptions and its error."""

    def core_died(self, cause: str) -> None:
        """The core is gone, for the cause; streams that are still live fail as soon as this returns."""


def _rounded(seconds: float) -> float:
    return round(seconds, 6)
