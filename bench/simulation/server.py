"""A server on simulated hardware as the server under test; implements `bench.measurement.server.ServerUnderTest`."""

from collections.abc import Callable
from datetime import UTC, datetime

import numpy as np

from bench.loadgen import Observer
from bench.search.windows import VIRTUAL_WARMUP_LATENCIES
from bench.simulation.load import VirtualLoad
from bench.simulation.reader import SimulationReader
from bench.simulation.recording import SimulatedRecording
from bench.workloads.base import RequestSpec
from engine.hardware.simulation import Simulation


class SimulatedServer:
    """Virtual time passes only while a load runs or something waits, so equal runs have equal times to the digit.

    Args:
        simulation: the server; its time is the clock of the measurement.
        hardware: its title.
    """

    fixes_lengths = True
    of_time = " of virtual time"
    warmup_latencies = VIRTUAL_WARMUP_LATENCIES

    def __init__(self, simulation: Simulation, hardware: str):
        self.name = f"simulated {hardware}"
        self.of_hardware = f", {self.name}"
        self._simulation = simulation
        self._read: Callable[[], object] = lambda: None
        self._cut_outputs = 0

    @property
    def note(self) -> str:
        """What the user should know of the loads so far; empty if nothing."""
        if not self._cut_outputs:
            return ""
        length = self._simulation.config.max_model_len
        return f"{self._cut_outputs} outputs were cut at --max-model-len {length}: raise it behind --"

    def now(self) -> float:
        return self._simulation.now()

    def sleep(self, seconds: float) -> None:
        end = self.now() + seconds
        while self.now() < end:
            self._simulation.run_until(end)

    def date(self) -> str:
        """The virtual time as a date, from the beginning of 1970 on: equal in equal runs."""
        return datetime.fromtimestamp(self.now(), UTC).isoformat(timespec="seconds")

    def open_reader(self) -> SimulationReader:
        reader = SimulationReader(self._simulation)
        self._read = reader.read
        return reader

    def open_machine(self) -> None:
        """The machine that simulates has no influence on the results."""

    def run_load(
        self,
        specs: list[RequestSpec],
        times: np.ndarray,
        *,
        observer: Observer,
        time_limit_s: float,
        needed: int | None = None,
    ) -> SimulatedRecording:
        awaited = len(specs) if needed is None else needed
        load = VirtualLoad(self._simulation, specs, observer, time_limit_s, awaited, self._read)
        return self._counted(load.run_open(times))

    def run_closed_loop(
        self,
        specs: list[RequestSpec],
        concurrency: int,
        *,
        observer: Observer,
        time_limit_s: float,
        chunks_per_s: float,  # noqa: ARG002 - decides the number of generator processes, of which there are none
    ) -> SimulatedRecording:
        load = VirtualLoad(self._simulation, specs, observer, time_limit_s, len(specs), self._read)
        return self._counted(load.run_closed(concurrency))

    def _counted(self, recording: SimulatedRecording) -> SimulatedRecording:
        self._cut_outputs += recording.cut_outputs
        return recording
