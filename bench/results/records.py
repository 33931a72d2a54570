"""The records of result files: one per request, load point, generator and reading of the metrics, and a summary."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bench.results.environment import hardware, utc_now, versions

Phase = Literal["probe", "search", "confirm", "ladder", "fixed", "closed", "offline"]

DISTURBED_SHARE = 0.1  # of the cores: if others use more, a load point is disturbed


@dataclass(slots=True)
class RequestRecord:
    """One request of a load point; `intended_s` and `sent_s` in seconds since its start."""

    index: int
    intended_s: float
    sent_s: float
    ttft_s: float | None  # from the intended send time, as e2e_s
    e2e_s: float | None
    input_tokens: int
    asked_output_tokens: int
    output_tokens: int
    cached_tokens: int
    in_window: bool
    status: str  # "ok", or the kind of failure: "http 429", "connection", "malformed stream", "cut short", …
    error: str = ""
    # Between arrivals of chunks; arrays where a load point has many requests with long outputs.
    chunk_gaps_s: Sequence[float] | NDArray[np.float64] = field(default_factory=list)
    chunk_tokens: Sequence[int] | NDArray[np.int8] = field(default_factory=list)  # of each chunk, including the first
    generator: str = ""  # HOST:PORT of the generator that sent it; "": the run itself, or an older file

    @property
    def decode_s(self) -> float:
        """From the first chunk to the last."""
        return float(np.sum(self.chunk_gaps_s))

    @property
    def later_tokens(self) -> int:
        """Tokens of all chunks but the first."""
        return int(np.sum(self.chunk_tokens[1:]))


@dataclass(slots=True)
class GeneratorRecord:
    """The part of one generator on another host in a load point; None: it was lost, or sent nothing."""

    point_id: str
    generator: str  # HOST:PORT
    requests: int  # of its part of the schedule, warm-up included
    sent: int  # of those: sent, or tried
    lateness_p99_ms: float | None  # as in PointRecord, as all that follow
    loop_lag_p99_ms: float | None
    processes: int | None
    cpu_s: float | None  # of all its processes
    cpu_share: float | None  # of one core, the busiest process
    starved_share: float | None
    us_per_chunk: float | None
    clock_offset_ms: float  # its clock minus that of the run, before the load
    clock_drift_ms: float | None
    clock_error_ms: float | None
    lost: bool


@dataclass(frozen=True, slots=True)
class ServerState:
    """One reading of the server's metrics, summed over engines (`kv_use`: maximum); None without such a metric."""

    at_s: float  # on a monotonic clock; in files since the start of the load point
    running: float | None = None
    waiting: float | None = None
    kv_use: float | None = None  # 0..1
    preemptions: float | None = None  # a counter
    retracted_now: float | None = None  # a gauge, if there is no counter
    prefix_queries: float | None = None  # counters, in tokens
    prefix_hits: float | None = None


@dataclass(slots=True)
class PointRecord:
    """One load point: one run of one rate; latencies in ms over the requests of the window."""

    point_id: str
    configuration: str
    workload: str
    phase: Phase
    rate: float  # requested, requests/s
    sustained: bool | None  # None: undecided, invalid or not judged
    reason: str  # of the verdict
    valid: bool
    provisional: bool  # the window was shorter than the precision requires
    preemptions: int | None  # None: the server has no such counter
    requests: int  # due within the window
    completed: int
    failed: int
    window_s: float
    achieved_rate: float  # completions/s in the window
    input_tok_s: float
    output_tok_s: float
    prefix_hit_rate: float | None
    kv_use_max: float | None  # 0..1
    waiting_max: int | None
    running_max: int | None
    lateness_p99_ms: float  # sent - intended
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    e2e_p50_ms: float
    e2e_p99_ms: float
    itl_p99_low_ms: float  # 95 % interval of the P99; the high end is inf if the window is too short
    itl_p99_high_ms: float
    ttft_p99_low_ms: float
    ttft_p99_high_ms: float
    seed: int
    started: str  # ISO 8601, UTC
    binding: str = ""  # what limited a load point that is not sustained, as in Answer
    repeat: int = 0  # number of the run of this rate; each run has other requests
    warmup_s: float = 0.0  # before the window
    tokens_per_chunk: float = 1.0  # gaps between chunks are gaps between tokens only if this is 1
    backlog_growth: float = 0.0  # over the window, in requests
    backlog_noise: float = 0.0  # growth up to which nothing is concluded
    cut_short: int = 0  # requests of the window open when the load point ended: their latencies are lower bounds
    failures: str = ""  # failed requests by kind, including the warm-up: "connection:3;http 429:12"
    goodput: float | None = None  # requests/s of the window that met every limit; None: no limits
    concurrency: int | None = None  # of a closed loop, whose `rate` is the completed one; None: an open loop
    generator_processes: int = 1
    generator_cpu_share: float = 0.0  # of one core, the busiest process
    generator_starved_share: float = 0.0  # of the time: ready to run while other processes had its core
    generator_us_per_chunk: float = 0.0  # CPU time
    loop_lag_p99_ms: float = 0.0  # from the arrival of bytes to their read
    verdict: str = ""  # "sustained", "not sustained", "undecided", "invalid"; "": not judged, or an older file
    ttft_trend: float | None = None  # growth of TTFT over the window, seconds per second; None: too few requests
    itl_steps: int = 0  # engine steps behind the gaps; 0 in older files
    coalesced_reads: int = 0  # reads that contained several chunks, which share the timestamp of the last
    others_cpu_share: float | None = None  # of the cores, used by other processes; None: not known
    steal_share: float | None = None  # of the cores, taken by the hypervisor; None: not known
    disturbed: bool = False  # the two together exceed DISTURBED_SHARE
    mean_power_w: float | None = None  # of the server's GPUs over the window; None: not measured
    joules_per_output_token: float | None = None  # their energy / output tokens of the window
    generators: str = ""  # on other hosts, HOST:PORT:OFFSET:DRIFT of their clocks in ms, joined by ";"; DRIFT or "lost"
    clock_drift_ms: float | None = None  # of the generator whose clock moved most; None: no generators on other hosts
    clock_error_ms: float | None = None  # up to which their clocks are known: above 1 ms the load point is invalid

    @property
    def disturbance(self) -> str:
        """What disturbed the load point, as text; "" if it was not disturbed."""
        if not self.disturbed:
            return ""
        text = f"other processes used {self.others_cpu_share or 0:.0%} of the cores"
        return text + (f" and the hypervisor took {self.steal_share:.0%}" if (self.steal_share or 0) >= 0.01 else "")

    @property
    def undecided(self) -> bool:
        return self.verdict == "undecided"

    def failed_requests(self) -> int:
        """The number of failed requests, including the warm-up."""
        return sum(count for _, count in self._failures())

    def failure_text(self) -> str:
        """The failures by kind, the most frequent first: "12 × http 429, 3 × connection"."""
        return ", ".join(f"{count} × {kind}" for kind, count in sorted(self._failures(), key=lambda pair: -pair[1]))

    def _failures(self) -> list[tuple[str, int]]:
        parts = [part.rpartition(":") for part in self.failures.split(";") if part]
        return [(kind, int(count)) for kind, _, count in parts]


@dataclass(slots=True)
class Answer:
    """The result of a search for one configuration and workload: the highest sustained rate and what limits it."""

    configuration: str
    workload: str
    rate: float | None  # requests/s; None: not even the lowest rate was sustained
    low: float
    high: float | None  # lowest rate above it that failed; None: none failed
    confirmed: bool
    provisional: bool
    binding: str  # "KV cache", "batch slots", "compute", "client", "latency limit", "not reached", "undecided"
    note: str = ""
    output_tok_s: float | None = None  # at `rate`
    disturbance: str = ""  # what disturbed the load points that it rests on, which makes it provisional
    undecided: float | None = None  # lowest undecided rate above it; None: there is none

    def line(self) -> str:
        """The last line of a bench run, e.g. "sustains 4.2 req/s (3.9–4.4); binding: KV cache"."""
        hint = " (windows too short)" if self.rate is None and self.undecided is not None else ""
        return f"{self.text()}{hint}; binding: {self.binding}"

    def text(self) -> str:
        """The answer without its binding, e.g. "sustains 4.2 req/s (3.9–4.4)"."""
        if self.rate is None and self.undecided is not None:
            above = f", not sustained from {self.high:.3g} req/s" if self.high is not None else ""
            return f"undecided at {self.undecided:.3g} req/s{above}"
        if self.rate is None:
            failed = [f"the lowest, {self.high:.3g} req/s, failed"] if self.high is not None else []
            failed += [self.provisional_text()] if self.disturbance else []
            return "sustains none of the measured rates" + (f" ({', '.join(failed)})" if failed else "")
        high = f"{self.high:.3g}" if self.high is not None else "?"
        marks = f", undecided from {self.undecided:.3g}" if self.undecided is not None else ""
        marks += f", {self.provisional_text()}" if self.provisional else ""
        marks += "" if self.confirmed else ", not confirmed"
        return f"sustains {self.rate:.3g} req/s ({self.low:.3g}–{high}{marks})"

    def provisional_text(self) -> str:
        """ "provisional", with the disturbance if there was one; "" if the answer is not provisional."""
        if not self.provisional:
            return ""
        return f"provisional: {self.disturbance}" if self.disturbance else "provisional"


@dataclass(slots=True)
class Summary:
    """What a run measured, on which machine, and its answers."""

    title: str
    seed: int
    configurations: dict[str, dict[str, Any]]
    workloads: dict[str, dict[str, Any]]
    answers: list[Answer] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # "configuration / workload" -> cause
    versions: dict[str, str] = field(default_factory=lambda: versions())
    hardware: dict[str, Any] = field(default_factory=lambda: hardware())
    started: str = field(default_factory=lambda: utc_now())
    finished: str | None = None
    simulated: bool = False  # whether any configuration is: it then has a field `simulated` with hardware and errors
