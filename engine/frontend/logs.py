"""The log for operators: throughput every ten seconds of traffic, and one line for each finished output."""

import logging
from collections.abc import Callable

import msgspec

from engine.frontend.listener import ClientListener, OutputRecord
from engine.log_format import is_json
from engine.stats import Stats

log = logging.getLogger("redline.stats")
request_log = logging.getLogger("redline.request")

PERIOD_S = 10.0


class StatsLog:
    """Turns the core's counters into log lines, each for the time since the previous line."""

    def __init__(self, now: float, core: Stats):
        self._at = now
        self._before = core
        self._idle = True

    def line(self, now: float, core: Stats, held: int = 0) -> str | None:
        """The line for the interval that ends now; None if the core is still idle.

        `held`: requests that wait until a replica serves.
        """
        before, elapsed = self._before, max(now - self._at, 1e-9)
        waiting = core.waiting + held
        if core.steps < before.steps:
            before = core  # one was started again and counts from zero: this interval is unknown
        self._before, self._at = core, now
        prompt = core.prompt_tokens - before.prompt_tokens
        generated = core.generation_tokens - before.generation_tokens
        if not (core.running or waiting or prompt or generated):
            was_idle, self._idle = self._idle, True
            return None if was_idle else "idle: no request is running or waiting"
        self._idle = False
        queries = core.prefix_queries - before.prefix_queries
        hits = f"{100 * (core.prefix_hits - before.prefix_hits) / queries:.1f} %" if queries else "-"
        drafted, accepted = core.num_draft_tokens, core.num_accepted_tokens - before.num_accepted_tokens
        drafted -= before.num_draft_tokens
        drafts = f", {100 * accepted / drafted:.1f} % of {drafted} draft tokens accepted" if drafted else ""
        return (
            f"prompt {prompt / elapsed:.1f} tok/s, generation {generated / elapsed:.1f} tok/s, "
            f"running {core.running}, waiting {waiting}, KV cache {100 * core.kv_cache_usage:.1f} %, "
            f"prefix hits {hits}, preemptions {core.preemptions - before.preemptions}{drafts}"
        )


class RequestLog(ClientListener):
    """Logs and traces finished outputs."""

    def __init__(self, *, logged: bool, traced: Callable[[OutputRecord], None] | None):
        """`logged`: write a line for each; `traced` is called with the record of each."""
        self._logged = logged
        self._traced = traced

    @property
    def wants_records(self) -> bool:
        return self._logged or self._traced is not None

    def output_recorded(self, record: OutputRecord) -> None:
        if self._logged:
            log_request(record)
        if self._traced is not None:
            self._traced(record)


def log_request(record: OutputRecord) -> None:
    """Log a record as one line of JSON."""
    fields = msgspec.to_builtins(record)
    extra = {"message": f"{record.request} ended", "request": fields} if is_json() else {}
    request_log.info("%s", msgspec.json.encode(record).decode(), extra={"fields": extra})
