"""The columns of a load point about its load generator, and about the clocks of generators on other hosts."""

import math
from typing import Any

from bench.loadgen import GeneratorHealth
from bench.loadgen.recording import HostClock


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


def _clock_text(clock: HostClock) -> str:
    """HOST:PORT:OFFSET:DRIFT, in ms; DRIFT is "lost" if the generator was."""
    drift = "lost" if math.isnan(clock.drift_s) else f"{clock.drift_s * 1e3:+.3f}"
    return f"{clock.generator}:{clock.offset_s * 1e3:+.3f}:{drift}"


def _most(seconds: list[float]) -> float | None:
    """The largest value, in ms; None without any. Those of lost generators are not known."""
    return max((1e3 * value for value in seconds if not math.isnan(value)), default=None)
