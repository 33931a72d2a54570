"""Reads the counters of a simulated server."""

from typing import Self

from bench.results import ServerState
from bench.target.metrics import Readings
from engine.hardware.simulation import Simulation


class SimulationReader(Readings):
    """A `bench.target.metrics.StateReader`; whoever lets time pass asks for the readings."""

    def __init__(self, simulation: Simulation):
        super().__init__()
        self._simulation = simulation

    def __enter__(self) -> Self:
        self.read()
        return self

    def __exit__(self, *_: object) -> None:
        """There is nothing to close."""

    def read(self) -> ServerState:
        """Take one reading now, as `redline serve` reports its replicas in /metrics."""
        replicas = self._simulation.stats()
        state = ServerState(
            at_s=self._simulation.now(),
            running=float(sum(one.running for one in replicas)),
            waiting=float(sum(one.waiting for one in replicas)),
            kv_use=max(one.kv_cache_usage for one in replicas),
            preemptions=float(sum(one.preemptions for one in replicas)),
            prefix_queries=float(sum(one.prefix_queries for one in replicas)),
            prefix_hits=float(sum(one.prefix_hits for one in replicas)),
        )
        self.states.append(state)
        return state

    def healthy(self) -> bool:
        return True
