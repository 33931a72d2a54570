"""Synthetic result folders with the shapes of real ones: flat latencies, a knee, the climb past it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.results import Answer, Phase, PointRecord, RequestRecord, RunFiles, ServerState, Summary

LADDER = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


@dataclass(frozen=True)
class Server:
    """A made-up deployment: capacity in req/s, latencies at rest in ms."""

    capacity: float
    ttft_ms: float = 60.0
    itl_ms: float = 18.0
    output: int = 32


def make_point(server: Server, configuration: str, workload: str, rate: float, phase: Phase, requests: int) -> tuple:
    """One load point of `server`: latencies grow as 1/(1 - load), and with the backlog past the capacity."""
    rng = np.random.default_rng(int(rate * 1000) + len(configuration) + len(phase))
    load = rate / server.capacity
    window = requests / rate
    queueing = server.ttft_ms * 0.6 * min(load, 0.95) / (1 - min(load, 0.95))
    backlog_ms = max(0.0, (load - 1) * window * 1000)
    ttft = server.ttft_ms + queueing * rng.exponential(1, requests) + backlog_ms * rng.uniform(0, 1, requests)
    gaps = server.itl_ms * (1 + min(load, 1.3) * rng.gamma(2, 0.4, (requests, server.output - 1)))
    rows = [_make_row(i, i / rate, ttft[i], gaps[i]) for i in range(requests)]
    achieved = min(rate, server.capacity)
    e2e = ttft + gaps.sum(axis=1)
    itl99, ttft99 = float(np.quantile(gaps, 0.99)), float(np.quantile(ttft, 0.99))
    sustained = load <= 1.0
    point = PointRecord(
        point_id=f"{configuration}-{workload}-{phase}-{rate:g}".replace("/", "_").replace(" ", "_"),
        configuration=configuration,
        workload=workload,
        phase=phase,
        rate=rate,
        sustained=sustained,
        reason="kept up" if sustained else "the queue grew by 0.8 requests/s",
        valid=True,
        provisional=requests < 200,
        preemptions=0 if sustained else 3,
        requests=requests,
        completed=requests,
        failed=0,
        window_s=window,
        achieved_rate=achieved,
        input_tok_s=achieved * 512,
        output_tok_s=achieved * server.output,
        prefix_hit_rate=0.8,
        kv_use_max=min(1.0, 0.6 * load),
        waiting_max=round(10 * load),
        running_max=8,
        lateness_p99_ms=0.2,
        ttft_p50_ms=float(np.median(ttft)),
        ttft_p99_ms=ttft99,
        itl_p50_ms=float(np.median(gaps)),
        itl_p99_ms=itl99,
        tpot_p50_ms=float(np.median(gaps.mean(axis=1))),
        tpot_p99_ms=float(np.quantile(gaps.mean(axis=1), 0.99)),
        e2e_p50_ms=float(np.median(e2e)),
        e2e_p99_ms=float(np.quantile(e2e, 0.99)),
        itl_p99_low_ms=itl99 * 0.93,
        itl_p99_high_ms=itl99 * 1.12,
        ttft_p99_low_ms=ttft99 * 0.8,
        ttft_p99_high_ms=float(ttft.max()) * 1.1,
        seed=1,
        started="2025-01-01T00:00:00+00:00",
        itl_steps=requests * 16,
    )
    return point, rows


def _make_row(i: int, at_s: float, ttft_ms: float, gaps_ms: np.ndarray) -> RequestRecord:
    output = len(gaps_ms) + 1
    return RequestRecord(
        index=i,
        intended_s=at_s,
        sent_s=at_s,
        ttft_s=ttft_ms / 1000,
        e2e_s=(ttft_ms + gaps_ms.sum()) / 1000,
        input_tokens=512,
        asked_output_tokens=output,
        output_tokens=output,
        cached_tokens=0,
        in_window=True,
        status="ok",
        chunk_gaps_s=(gaps_ms / 1000).tolist(),
        chunk_tokens=[1] * output,
    )


def make_readings(point: PointRecord, requests: list[RequestRecord], rows: int = 8) -> list[ServerState]:
    """What a server with so many rows would have said twice a second: running, waiting, KV use, preemptions."""
    readings = []
    total = point.preemptions or 0
    begins = np.array([r.intended_s for r in requests])
    ends = begins + np.array([r.e2e_s or 0.0 for r in requests])
    for step in range(-1, int(2 * ends.max()) + 3):
        at = step / 2
        open_now = int(((begins <= at) & (at < ends)).sum())
        running = min(rows, open_now)
        share = max(0.0, min(1.0, at / point.window_s))
        readings.append(
            ServerState(
                at_s=at,
                running=float(running),
                waiting=float(open_now - running),
                kv_use=0.97 * running / rows,
                preemptions=float(round(total * share)),
            )
        )
    return readings


def write_run(
    folder: Path,
    servers: dict[str, Server],
    workloads: dict[str, float],
    *,
    requests: int = 80,
    title: str = "Prefix caching on and off",
) -> Path:
    """A finished sweep; `workloads` maps a name to the factor its servers' capacity has on it."""
    files = RunFiles(folder)
    summary = Summary(
        title=title,
        seed=1,
        configurations={
            name: {"model": "smollm2-135m", "serve": {"dtype": "bfloat16", "max-num-seqs": 16}} for name in servers
        },
        workloads={name: {"kind": "random", "input": 512, "output": 32} for name in workloads},
        versions={"python": "3.11.9", "redline-llm": "0.1.0", "torch": "2.13.0"},
        hardware={"cpu": "Intel Xeon Platinum 8481C CPU @ 2.70GHz", "cores": 2, "memory_gib": 7.8, "system": "Linux"},
    )
    for workload, factor in workloads.items():
        best = max(s.capacity for s in servers.values()) * factor
        for name, plain in servers.items():
            server = Server(plain.capacity * factor, plain.ttft_ms / factor, plain.itl_ms, plain.output)
            found = server.capacity * 0.96
            plan: list[tuple[float, Phase]] = [(found * 0.5, "search"), (found * 1.6, "search"), (found, "confirm")]
            plan += [(float(f"{best * step:.3g}"), "ladder") for step in LADDER]
            for rate, phase in plan:
                point, rows = make_point(server, name, workload, rate, phase, requests)
                files.add_point(point, rows, make_readings(point, rows))
            summary.answers.append(
                Answer(
                    configuration=name,
                    workload=workload,
                    rate=found,
                    low=found * 0.93,
                    high=found * 1.08,
                    confirmed=True,
                    provisional=requests < 200,
                    binding="compute",
                    output_tok_s=found * server.output,
                )
            )
    summary.finished = "2025-01-01T00:10:00+00:00"
    files.write_summary(summary)
    return folder


TWO = {"prefix caching on": Server(4.4, 70), "prefix caching off": Server(1.9, 240, 21)}
DEMO = {"shared-prefix 448+64/32": 1.0}
ARTICLES = {"500/2000": 1.0, "2048/128": 0.6, "6000/4000": 0.25}


def edited(folder: Path, change: Callable[[PointRecord], PointRecord]) -> None:
    """Rewrite points.csv with every point changed."""
    files = RunFiles(folder)
    files.write_points([change(p) for p in files.read_points()])


def assert_close(value: float | None, wanted: float, tolerance: float = 1e-6) -> None:
    assert value is not None
    assert math.isclose(value, wanted, rel_tol=tolerance), f"{value} is not {wanted}"
