"""Starts the server of a configuration, and makes its workload; or simulates it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.generators import Generators
from bench.measurement.energy import EnergyMeter
from bench.measurement.nvml import find_energy
from bench.measurement.run import LostServerError
from bench.measurement.server import HttpServer, ServerUnderTest
from bench.simulation import SimulatedServer
from bench.sweeps.configurations import Configuration
from bench.sweeps.sweepfile import SweepWorkload
from bench.target.control import unused_proxy
from bench.target.probe import probe_server
from bench.target.reported_config import resolved_configuration
from bench.workloads import Workload
from bench.workloads.encoding import server_encoder
from engine.errors import RedlineError
from engine.simulation import Simulate


@dataclass(frozen=True, slots=True)
class Started:
    """A configuration's server, the workload for its vocabulary, and what became known of it, for the summary."""

    under_test: ServerUnderTest
    requests: Workload
    model: str
    resolved: dict[str, Any]
    known: dict[str, Any] = field(default_factory=dict)
    meter: EnergyMeter | None = None


@contextlib.contextmanager
def started(
    configuration: Configuration,
    workload: SweepWorkload,
    log: Path,
    show: Callable[[str], None],
    simulate: Simulate | None,
    generators: Generators | None,
) -> Iterator[Started]:
    """The configuration's server for a workload; it is stopped at the end.

    Args:
        configuration: of the sweep.
        workload: of the sweep.
        log: file for the server's output.
        show: called with messages.
        simulate: makes the engine of a configuration on simulated hardware; None: the sweep has none.
        generators: hosts that send the load; None: this one does.
    """
    shown = configuration.shown(workload.max_tokens)
    if configuration.is_simulated:
        show(f"simulating {shown} …")
        yield _simulated(configuration, workload, show, simulate)
        return
    show(f"measuring {shown} …" if configuration.is_running else f"starting {shown} …")
    server = configuration.server(workload.max_tokens, log)
    with server:
        try:
            yield _probed(configuration, workload, server.base_url, show, generators)
        except LostServerError:
            if not server.ends():
                raise
            raise BenchError(f"the server exited: {server.cause()}") from None


def _probed(
    configuration: Configuration,
    workload: SweepWorkload,
    base_url: str,
    show: Callable[[str], None],
    generators: Generators | None,
) -> Started:
    info = probe_server(configuration.target(base_url))
    target = info.target
    assert target is not None
    for note in (*info.notes, unused_proxy(target)):
        if note:
            show(note)
    if generators is not None:
        generators.check(target)
    vocabulary = configuration.vocab_size or info.vocab_size
    if vocabulary is None and workload.needs_vocabulary:
        raise BenchError(
            f"the server does not report its vocabulary size: set configurations.{configuration.name}.vocab_size"
        )
    resolved = resolved_configuration(target)
    energy = find_energy(configuration.energy_gpus, target, str(resolved.get("device", "")))
    requests = workload.build(vocabulary, server_encoder(target))
    known: dict[str, Any] = {"server": info.kind, "energy": energy.described}
    known |= {"generators": generators.names} if generators is not None else {}
    return Started(HttpServer(target, generators), requests, info.model, resolved, known, energy.meter)


def _simulated(
    configuration: Configuration,
    workload: SweepWorkload,
    show: Callable[[str], None],
    simulate: Simulate | None,
) -> Started:
    assert configuration.model is not None
    assert simulate is not None
    try:
        engine = simulate(configuration.model, configuration.arguments(workload.max_tokens))
    except RedlineError as error:
        raise BenchError(str(error)) from error
    for warning in engine.warnings:
        show(f"warning: {warning}")
    server = SimulatedServer(engine.simulation, engine.title)
    known = {"server": "redline", "simulated": engine.mark}
    return Started(server, workload.build(engine.vocab_size), engine.model, engine.resolved, known)
