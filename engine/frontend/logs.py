"""What an operator reads: a line of figures every ten seconds of traffic, and a line for each request that ended."""

import logging

import msgspec

from engine.frontend.streams import Output
from engine.messages import Stats

log = logging.getLogger("redline.stats")
request_log = logging.getLogger("redline.request")

PERIOD_S = 10.0


class StatsLog:
    """Turns the core's counters into a line for the time since the line before, and is silent while nothing happens."""

    def __init__(self, now: float, core: Stats):
        self._at = now
        self._before = core
        self._idle = True

    def line(self, now: float, core: Stats) -> str | None:
        """The line for the interval that ends now; None if there is nothing to say."""
        before, elapsed = self._before, max(now - self._at, 1e-9)
        self._before, self._at = core, now
        prompt = core.prompt_tokens - before.prompt_tokens
        generated = core.generation_tokens - before.generation_tokens
        if not (core.running or core.waiting or prompt or generated):
            was_idle, self._idle = self._idle, True
            return None if was_idle else "idle: no request is running or waiting"
        self._idle = False
        queries = core.prefix_queries - before.prefix_queries
        hits = f"{100 * (core.prefix_hits - before.prefix_hits) / queries:.1f} %" if queries else "-"
        return (
            f"prompt {prompt / elapsed:.1f} tok/s, generation {generated / elapsed:.1f} tok/s, "
            f"running {core.running}, waiting {core.waiting}, KV cache {100 * core.kv_cache_usage:.1f} %, "
            f"prefix hits {hits}, preemptions {core.preemptions - before.preemptions}" + self._guesses(before, core)
        )

    @staticmethod
    def _guesses(before: Stats, core: Stats) -> str:
        drafted, accepted = (
            core.num_draft_tokens - before.num_draft_tokens,
            core.num_accepted_tokens - before.num_accepted_tokens,
        )
        return f", {100 * accepted / drafted:.1f} % of {drafted} guesses right" if drafted else ""


class Ended(msgspec.Struct):
    """One output that is over; times in seconds."""

    request: str
    index: int  # of the output, where the request has several
    model: str
    client: str
    front_end: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    finish_reason: str
    ttft_s: float | None  # None: it had no token
    itl_s: float | None  # mean; None: it had less than two tokens
    e2e_s: float
    queue_s: float
    preemptions: int = 0
    error: str | None = None
    replica: int = 0

    @classmethod
    def of(cls, output: Output, reason: str, now: float, front_end: int) -> "Ended":
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
        )


def log_request(ended: Ended) -> None:
    """One line of JSON."""
    request_log.info("%s", msgspec.json.encode(ended).decode())


def _rounded(seconds: float) -> float:
    return round(seconds, 6)


def log_to_stderr() -> None:
    """Show what the front end logs, as the EngineCore's process shows its own; not what its libraries log."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s: %(message)s"))
    redline = logging.getLogger("redline")
    redline.handlers = [handler]
    redline.propagate = False
    redline.setLevel(logging.INFO)
