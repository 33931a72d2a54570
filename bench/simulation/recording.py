"""The recording of a simulated load point."""

from dataclasses import dataclass

import numpy as np

from bench.loadgen import GeneratorHealth
from bench.results import RequestRecord
from bench.workloads.base import RequestSpec
from engine.hardware.simulation import Reply, Simulation

# A generator without costs: it is never late, and reads every token as it arrives.
_HEALTH = GeneratorHealth(
    lateness_p99_s=0.0, loop_lag_p99_s=0.0, cpu_share=0.0, coalesced_reads=0, saturated=False, reason=""
)


@dataclass(slots=True)
class SentRequest:
    """A request of a load point, in the order of its specs."""

    index: int
    at_s: float  # on the simulation's clock
    reply: Reply


class SimulatedRecording:
    """The requests that were sent, after the load; the simulation keeps nothing of them."""

    def __init__(
        self,
        simulation: Simulation,
        sent: list[SentRequest],
        specs: list[RequestSpec],
        start_s: float,
        *,
        cut_short: bool,
    ):
        self._sent, self._specs, self._start_s = sent, specs, start_s
        self.cut_short = cut_short
        self._longest = simulation.config.max_model_len
        simulation.take([one.reply for one in sent])
        longest = max((one.reply.count for one in sent), default=0)
        self._ones = np.ones(longest, np.int8)  # of which all lists of tokens per chunk are parts

    @property
    def health(self) -> GeneratorHealth:
        return _HEALTH

    @property
    def cut_outputs(self) -> int:
        """Requests whose outputs ended before their length because of --max-model-len."""
        return sum(self._is_cut(one) for one in self._sent)

    def records(self, window: tuple[float, float]) -> list[RequestRecord]:
        """One record per request; `window` in seconds, by send times, without its end."""
        return [self._record(one, window) for one in self._sent]

    def _is_cut(self, sent: SentRequest) -> bool:
        return _status(sent.reply) == "ok" and sent.reply.count < self._specs[sent.index].output_tokens

    def _record(self, sent: SentRequest, window: tuple[float, float]) -> RequestRecord:
        spec, reply, times = self._specs[sent.index], sent.reply, sent.reply.times
        at_s, status = sent.at_s - self._start_s, _status(reply)
        return RequestRecord(
            index=sent.index,
            intended_s=at_s,
            sent_s=at_s,
            ttft_s=times.first_s - sent.at_s if times is not None else None,
            e2e_s=times.last_s - sent.at_s if times is not None and status == "ok" else None,
            input_tokens=reply.prompt_tokens,
            asked_output_tokens=spec.output_tokens,
            output_tokens=reply.count,
            cached_tokens=reply.cached_tokens,
            in_window=window[0] <= at_s < window[1],
            status=status,
            error=f"the output was cut at --max-model-len {self._longest}" if self._is_cut(sent) else reply.error,
            chunk_gaps_s=times.gaps_s if times is not None else np.empty(0),
            chunk_tokens=self._ones[: reply.count],
        )


def _status(reply: Reply) -> str:
    """As a server over HTTP would answer."""
    if reply.error:
        return "http 400" if reply.refused else "http 500"
    return "ok" if reply.ended else "cut short"
