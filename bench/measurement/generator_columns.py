"""What the records of a load point say of its load generator, and of generators on other hosts."""

import math
from typing import Any

from bench.loadgen import GeneratorHealth
from bench.loadgen.recording import HostClock, HostHealth
from bench.results import GeneratorRecord


def generator_columns(health: GeneratorHealth) -> dict[str, Any]:
    """The columns of PointRecord about the load generator."""
    return {
        "lateness_p99_ms": health.lateness_p99_s * 1e3,
        "generator_processes": health.processes,
        "generator_cpu_share": health.cpu_share,
        "generator_starved_share": health.starved_share,
        "generator_us_per_chunk": health.cpu_us_per_chunk,
        "loop_lag_p99_ms": health.loop_lag_p99_s * 1e3,
        "coalesced_reads": health.coalesced_reads,
        "generators": ";".join(_clock_text(clock) for clock in health.clocks),
        "clock_drift_ms": _most([abs(clock.drift_s) for clock in health.clocks]),
        "clock_error_ms": _most([clock.error_s for clock in health.clocks]),
    }


def generator_records(point_id: str, health: GeneratorHealth) -> list[GeneratorRecord]:
    """One record per generator on another host."""
    return [_record(point_id, host) for host in health.hosts]


def _record(point_id: str, host: HostHealth) -> GeneratorRecord:
    clock, use = host.clock, host.use
    return GeneratorRecord(
        point_id=point_id,
        generator=clock.generator,
        requests=host.requests,
        sent=host.sent,
        lateness_p99_ms=host.lateness_p99_s * 1e3 if host.sent else None,
        loop_lag_p99_ms=host.loop_lag_p99_s * 1e3 if host.sent else None,
        processes=None if use is None else use.processes,
        cpu_s=None if use is None else use.cpu_s,
        cpu_share=None if use is None else use.cpu_share,
        starved_share=None if use is None else use.starved_share,
        us_per_chunk=None if use is None or not host.chunks else use.cpu_s * 1e6 / host.chunks,
        clock_offset_ms=clock.offset_s * 1e3,
        clock_drift_ms=_known_ms(clock.drift_s),
        clock_error_ms=_known_ms(clock.error_s),
        lost=use is None,
    )


def _known_ms(seconds: float) -> float | None:
    return None if math.isnan(seconds) else seconds * 1e3


def _clock_text(clock: HostClock) -> str:
    """HOST:PORT:OFFSET:DRIFT, in ms; DRIFT is "lost" if the generator was."""
    drift = "lost" if math.isnan(clock.drift_s) else f"{clock.drift_s * 1e3:+.3f}"
    return f"{clock.generator}:{clock.offset_s * 1e3:+.3f}:{drift}"


def _most(seconds: list[float]) -> float | None:
    """The largest value, in ms; None without any. Those of lost generators are not known."""
    return max((1e3 * value for value in seconds if not math.isnan(value)), default=None)
