"""Thousands of streams from two generators: what they report, and what a stream costs. For `make bench-generators`.

An open loop against a server with a known schedule (known_server.cpp). Each answer has 32 tokens, so far apart that all
streams together get CHUNKS_PER_S=10000 chunks per second, and requests arrive at the rate that keeps N streams open.
The server has one core; the run and both generators share the other one. Each generator has a network namespace, as a
host has its own ports, where namespaces can be made.
"""

import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.results import GeneratorRecord, PointRecord, RunFiles
from tests.perf.bench_client import ROOT, KnownServer, Truth, cores, pinned
from tests.perf.child_processes import start_child
from tests.perf.generator_hosts import RunningGenerator, hosts, running_generators

TOKENS = 32
TTFT_MS = 50.0
WARMUP, WINDOW = 1.2, 1.1  # x the length of an answer
MARGIN = 400  # open files of the server beside the streams


@dataclass(frozen=True, slots=True)
class Load:
    """N streams on average.

    itl_ms: between two tokens of an answer. rate: requests/s.
    """

    streams: int
    itl_ms: float

    @property
    def answer_s(self) -> float:
        return (TTFT_MS + (TOKENS - 1) * self.itl_ms) / 1e3

    @property
    def rate(self) -> float:
        return self.streams / self.answer_s

    def flags(self) -> list[str]:
        times = ["--warmup", f"{WARMUP * self.answer_s:.1f}", "--window", f"{WINDOW * self.answer_s:.1f}"]
        size = ["--input", "16", "--output", str(TOKENS), "--vocab-size", "10000"]
        return ["--rate", f"{self.rate:.6g}", *times, *size]


def load_of(streams: int) -> Load:
    return Load(streams, 1e3 * streams / float(os.environ.get("CHUNKS_PER_S", "10000")))


def measure_streams(streams: int, count: int) -> dict[str, Any]:
    """One load from `count` generators; prints its row and returns it."""
    load = load_of(streams)
    server_core, client_core = cores()
    _check_files(streams)
    flags = ("--ttft-ms", str(TTFT_MS), "--itl-ms", str(load.itl_ms))
    with tempfile.TemporaryDirectory() as name, hosts(count) as places:
        folder = Path(name)
        with running_generators(places.generators, pinned(client_core)) as generators:
            with KnownServer(folder, server_core, *flags, host=places.server) as server:
                run = _run(server.url, load, generators, folder, client_core)
                server_cpu_s = server.cpu_s()
            memory = [one.peak_mib() for one in generators]
        files = RunFiles(folder / "run")
        point = files.read_points()[-1]
        rows = files.read_requests(point.point_id)
        parts = [part for part in files.read_generators() if part.point_id == point.point_id]
        truth = Truth.read(server.log, int((rows.status == "ok").sum()))
    row = {"case": f"{streams} streams", "generators": count, "hosts": places.described, "itl_ms": load.itl_ms}
    row |= _measured(point, rows, truth) | _costs(streams, parts, memory, run)
    row["server_cpu_share"] = round(server_cpu_s / run["wall_s"], 3)
    _print(row)
    return row


def _check_files(streams: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < streams + MARGIN:
        sys.exit(
            f"the server needs {streams + MARGIN} open files, and {hard} are allowed: raise the limit (ulimit -Hn)"
        )


def _run(url: str, load: Load, generators: list[RunningGenerator], folder: Path, core: int) -> dict[str, float]:
    """The run to its end; what it used."""
    command = [
        *pinned(core), sys.executable, "-m", "cli.main", "bench", "--url", url, *load.flags(), "--out",
        str(folder / "run"), "--generators", ",".join(one.address for one in generators),
    ]  # fmt: skip
    with (folder / "said").open("w") as said:
        began = time.monotonic()
        process = start_child(command, stdout=said, stderr=subprocess.STDOUT, cwd=ROOT)
        _, status, used = os.wait4(process.pid, 0)
        wall_s = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
    text = (folder / "said").read_text()
    if process.returncode not in (0, 1, 4) or not (folder / "run" / "points.csv").exists():
        sys.exit(f"redline bench ended with exit code {process.returncode}:\n{text[-2000:]}")
    return {"memory_mib": used.ru_maxrss / 1024, "cpu_s": used.ru_utime + used.ru_stime, "wall_s": wall_s}


def _measured(point: PointRecord, rows: pd.DataFrame, truth: Truth) -> dict[str, Any]:
    done = rows[rows.status == "ok"]
    ttft_ms, late_ms = done.ttft_s.to_numpy() * 1e3, (done.sent_s - done.intended_s).to_numpy() * 1e3
    start_s, end_s = point.warmup_s, point.warmup_s + point.window_s
    opened = _open_at(rows, np.arange(start_s, end_s, 0.1))
    numbers = {
        "open_mean": opened.mean(), "open_max": opened.max(), "chunks_per_s": point.output_tok_s,
        "true_ttft_p99_ms": np.percentile(truth.ttft_ms(), 99), "ttft_p99_ms": np.percentile(ttft_ms, 99),
        "ttft_from_send_p99_ms": np.percentile(ttft_ms - late_ms, 99),
        "true_itl_p99_ms": np.percentile(truth.itl_ms(), 99),
        "itl_p99_ms": np.percentile(np.concatenate(done.chunk_gaps_s.to_list()), 99) * 1e3,
        "lateness_p99_ms": np.percentile(late_ms, 99), "loop_lag_p99_ms": point.loop_lag_p99_ms,
        "clock_error_ms": point.clock_error_ms or math.nan,
    }  # fmt: skip
    counts = {"requests": len(rows), "failed": point.failed_requests()}
    verdict = {"valid": point.valid, "verdict": point.verdict, "reason": point.reason}
    return counts | {key: round(float(value), 4) for key, value in numbers.items()} | verdict


def _open_at(rows: pd.DataFrame, moments: np.ndarray) -> np.ndarray:
    """How many streams were open: sent, and not ended; those that were cut short are open to the end."""
    begin = np.sort(rows.sent_s.to_numpy())
    ends = (rows.intended_s + rows.e2e_s).to_numpy()
    end = np.sort(np.where(np.isnan(ends), np.inf, ends))
    return np.searchsorted(begin, moments, "right") - np.searchsorted(end, moments, "right")


def _costs(streams: int, parts: list[GeneratorRecord], memory: list[float], run: dict[str, float]) -> dict[str, Any]:
    """CPU shares are of a core while the load runs; memory is the most that processes had, with their start."""
    shares = [part.cpu_share or 0.0 for part in parts]
    return {
        "sent": [part.sent for part in parts],
        "cpu_share": [round(share, 4) for share in shares],
        "us_per_chunk": [round(part.us_per_chunk or 0.0, 2) for part in parts],
        "generator_mib": [round(one, 1) for one in memory],
        "cpu_share_per_1000": round(sum(shares) * 1000 / streams, 4),
        "generator_mib_per_1000": round(sum(memory) * 1000 / streams, 1),
        "run_mib": round(run["memory_mib"], 1),
        "run_cpu_s": round(run["cpu_s"], 2),
    }


def _print(row: dict[str, Any]) -> None:
    print(f"\n{row['case']}, a token each {row['itl_ms']:.0f} ms, {row['generators']} generators {row['hosts']}")
    print(
        f"open streams: mean {row['open_mean']:.0f}, at most {row['open_max']:.0f}; {row['requests']} requests, "
        f"{row['failed']} failed; {row['chunks_per_s']:.0f} chunks/s"
    )
    for name, true, said in (
        ("TTFT", "true_ttft_p99_ms", "ttft_p99_ms"),
        ("TTFT from the send", "true_ttft_p99_ms", "ttft_from_send_p99_ms"),
        ("ITL", "true_itl_p99_ms", "itl_p99_ms"),
    ):
        print(f"P99 of {name}: true {row[true]:.3f} ms, reported {row[said]:.3f} ms")
    print(f"lateness P99 {row['lateness_p99_ms']:.3f} ms, reads P99 {row['loop_lag_p99_ms']:.3f} ms after the arrival")
    print(
        f"a core per 1,000 streams {row['cpu_share_per_1000']:.1%}, memory {row['generator_mib_per_1000']:.0f} MiB; "
        f"generators {row['us_per_chunk']} us a chunk, {row['generator_mib']} MiB; run {row['run_mib']:.0f} MiB; "
        f"server {row['server_cpu_share']:.0%} of its core"
    )
    print(f"{'valid' if row['valid'] else 'INVALID'}, {row['verdict'] or 'no verdict'}: {row['reason']}", flush=True)
