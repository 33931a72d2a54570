"""The server under test as a load point sees it: it takes load, shows its counters, and has a clock.

A server over HTTP is one; `bench.simulation` has another, on simulated hardware in virtual time. Everything that a
measurement waits for or dates goes through it, so search, criteria and files are the same for both.
"""

import time
from typing import Protocol

import numpy as np

from bench.generators import Generators
from bench.loadgen import GeneratorHealth, Observer, processes_for, run_closed_loop, run_load
from bench.measurement.machine import CounterReader, MachineReader
from bench.results import RequestRecord, utc_now
from bench.search.windows import WARMUP_LATENCIES
from bench.target import Target
from bench.target.metrics import MetricsReader, StateReader
from bench.workloads.base import RequestSpec


class LoadRecording(Protocol):
    """What was recorded of one load; `bench.loadgen.Recording` is one."""

    cut_short: bool  # requests were open when it ended

    @property
    def health(self) -> GeneratorHealth: ...

    def records(self, window: tuple[float, float], /) -> list[RequestRecord]:
        """One record per request that was sent or tried; `window` in seconds, by intended times, without its end."""
        ...


class ServerUnderTest(Protocol):
    """A server, the generator of its load, and the clock of both."""

    @property
    def name(self) -> str:
        """Its name in messages, such as its address."""
        ...

    @property
    def fixes_lengths(self) -> bool:
        """Whether outputs are requested with exactly the workload's length."""
        ...

    @property
    def of_time(self) -> str:
        """What follows a duration in messages: "" for real time."""
        ...

    @property
    def of_hardware(self) -> str:
        """What follows a title: the simulated hardware; "" for a server that is measured."""
        ...

    @property
    def warmup_latencies(self) -> float:
        """Length of the warm-up before a window, in expected E2E latencies."""
        ...

    def now(self) -> float:
        """Seconds on the clock of the measurement."""
        ...

    def sleep(self, seconds: float) -> None: ...

    def date(self) -> str:
        """Date and time, ISO 8601."""
        ...

    def open_reader(self) -> StateReader:
        """A new reader of its counters, a context manager."""
        ...

    def open_machine(self) -> CounterReader | None:
        """A reader of other load on its machine; None: there is none to read."""
        ...

    def run_load(
        self,
        specs: list[RequestSpec],
        times: np.ndarray,
        *,
        observer: Observer,
        time_limit_s: float,
        needed: int | None = None,
    ) -> LoadRecording:
        """As `bench.loadgen.run_load`."""
        ...

    def run_closed_loop(
        self,
        specs: list[RequestSpec],
        concurrency: int,
        *,
        observer: Observer,
        time_limit_s: float,
        chunks_per_s: float,
    ) -> LoadRecording:
        """As `bench.loadgen.run_closed_loop`; `chunks_per_s` is an upper estimate of the chunks to receive."""
        ...


class HttpServer:
    """A server over HTTP, in real time, loaded by the load generator.

    Args:
        target: the server.
        generators: hosts that generate the load; None: this process and its children do.
    """

    of_time = of_hardware = ""
    warmup_latencies = WARMUP_LATENCIES

    def __init__(self, target: Target, generators: Generators | None = None):
        self.target = target
        self._generators = generators

    @property
    def name(self) -> str:
        return self.target.base_url

    @property
    def fixes_lengths(self) -> bool:
        return self.target.fixes_lengths

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def date(self) -> str:
        return utc_now()

    def open_reader(self) -> MetricsReader:
        return MetricsReader(self.target)

    def open_machine(self) -> MachineReader:
        return MachineReader(self.target.base_url, self._generators.pids_here() if self._generators else ())

    def run_load(
        self,
        specs: list[RequestSpec],
        times: np.ndarray,
        *,
        observer: Observer,
        time_limit_s: float,
        needed: int | None = None,
    ) -> LoadRecording:
        run = run_load if self._generators is None else self._generators.run_load
        return run(self.target, specs, times, observer=observer, time_limit_s=time_limit_s, needed=needed)

    def run_closed_loop(
        self,
        specs: list[RequestSpec],
        concurrency: int,
        *,
        observer: Observer,
        time_limit_s: float,
        chunks_per_s: float,
    ) -> LoadRecording:
        if self._generators is not None:
            return self._generators.run_closed_loop(
                self.target, specs, concurrency,
                observer=observer, time_limit_s=time_limit_s, chunks_per_s=chunks_per_s,
            )  # fmt: skip
        return run_closed_loop(
            self.target, specs, concurrency,
            observer=observer, time_limit_s=time_limit_s, processes=processes_for(chunks_per_s),
        )  # fmt: skip
