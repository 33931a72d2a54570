"""`make bench-generators`: what two generators report together, against a server that logs what it truly sent.

The server (known_server.cpp) has one core, and the run and its generators share the other one. Each load is sent once
by the run itself and once by two generators on loopback, in closed loops of N streams and in open loops of R requests
per second, of 16/64 tokens. True TTFT and ITL are as in bench_client.py. In an open loop TTFT counts from the intended
time, so a row also has its P99 from the send, which is what the server can know, and the P99 of the lateness. The last
column is the error of the clocks of the generators, as the run compared them.
Prints a table and writes results/bench-generators.json. STREAMS=16,64 and RATES=50,200 pick other loads.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.generators.handshake import TOKEN_VARIABLE
from tests.perf.bench_client import ROOT, KnownServer, Truth, build, cores, finish, pinned, start
from tests.perf.child_processes import start_child
from tests.perf.client_tools import Run, redline_command

RESULTS = ROOT / "results" / "bench-generators.json"
GENERATORS = 2
ROUNDS = 4  # requests of each stream


@contextlib.contextmanager
def generators(count: int, core: int) -> Iterator[list[str]]:
    """Addresses of generators on loopback."""
    command = [*pinned(core), sys.executable, "-m", "cli.main", "generate", "--listen", "127.0.0.1:0"]
    processes = [
        start_child(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
        for _ in range(count)
    ]
    try:
        addresses = []
        for process in processes:
            assert process.stdout is not None
            found = re.search(r"on (127\.0\.0\.1:\d+)", process.stdout.readline())
            assert found is not None
            addresses.append(found[1])
        yield addresses
    finally:
        for process in processes:
            process.terminate()
            process.communicate()


def measure(case: str, load: tuple[str, ...], count: int) -> dict[str, Any]:
    """One load against a fresh server, by `count` generators, or by the run itself if it is 0."""
    server_core, client_core = cores()
    with tempfile.TemporaryDirectory() as name, generators(count, client_core) as addresses:
        folder = Path(name)
        with KnownServer(folder, server_core) as server:
            named = ("--generators", ",".join(addresses)) if count else ()
            more = ("--vocab-size", "10000", *load, *named)
            process = start([*pinned(client_core), *redline_command(Run(server.url, 0, 0, folder), *more)])
            finish(process, f"redline with {count} generators")
        point = pd.read_csv(folder / "run" / "points.csv").iloc[-1]
        rows = pd.read_parquet(folder / "run" / "requests" / f"{point.point_id}.parquet")
        rows = rows[rows.status == "ok"]
        truth = Truth.read(server.log, len(rows))
    return row_of(case, count, point, rows, truth)


def row_of(case: str, count: int, point: pd.Series, rows: pd.DataFrame, truth: Truth) -> dict[str, Any]:
    ttft_ms = rows.ttft_s.to_numpy() * 1e3
    late_ms = (rows.sent_s - rows.intended_s).to_numpy() * 1e3
    numbers = {
        "true_ttft_p99_ms": np.percentile(truth.ttft_ms(), 99),
        "ttft_p99_ms": np.percentile(ttft_ms, 99),
        "ttft_from_send_p99_ms": np.percentile(ttft_ms - late_ms, 99),
        "true_itl_p99_ms": np.percentile(truth.itl_ms(), 99),
        "itl_p99_ms": np.percentile(np.concatenate(rows.chunk_gaps_s.to_list()), 99) * 1e3,
        "lateness_p99_ms": np.percentile(late_ms, 99),
        "clock_error_ms": point.clock_error_ms,
        "clock_drift_ms": point.clock_drift_ms,
    }
    rounded = {key: None if pd.isna(value) else round(float(value), 4) for key, value in numbers.items()}
    head: dict[str, Any] = {"case": case, "generators": count, "requests": len(rows)}
    return head | rounded | {"valid": bool(point.valid), "reason": "" if point.valid else str(point.reason)}


def print_row(row: dict[str, Any]) -> None:
    error, count = row["clock_error_ms"], row["generators"] or "none"
    numbers = ("true_ttft_p99_ms", "ttft_p99_ms", "ttft_from_send_p99_ms", "true_itl_p99_ms", "itl_p99_ms")
    print(
        f"{row['case']:<12} {count:>10}   {' '.join(f'{row[one]:>9.3f}' for one in numbers)}"
        f"  {row['lateness_p99_ms']:>5.3f}  {'' if error is None else f'{error:.3f}':>6}"
        f"  {'' if row['valid'] else 'INVALID: ' + row['reason']}",
        flush=True,
    )


def loads() -> list[tuple[str, tuple[str, ...]]]:
    streams = [int(n) for n in os.environ.get("STREAMS", "16,64,256").split(",")]
    rates = [float(n) for n in os.environ.get("RATES", "20,100").split(",")]
    closed = [(f"{n} streams", ("--concurrency", str(n), "--num-requests", str(n * ROUNDS))) for n in streams]
    opened = [(f"{r:g} req/s", ("--rate", f"{r:g}", "--window", "6")) for r in rates]
    return closed + opened


def main() -> None:
    os.environ[TOKEN_VARIABLE] = "the token of this benchmark"
    build()
    print("TTFT 50 ms, ITL 20 ms; P99 in ms")
    print("load         generators   TTFT true      said from send  ITL true      said   late   clock")
    rows = []
    for case, load in loads():
        for count in (0, GENERATORS):
            rows.append(measure(case, load, count))
            print_row(rows[-1])
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    mine = [row for row in rows if row["generators"]]
    pairs = (("ttft_from_send_p99_ms", "true_ttft_p99_ms"), ("itl_p99_ms", "true_itl_p99_ms"))
    worst = max(abs(row[said] - row[true]) for row in mine for said, true in pairs)
    where = RESULTS.relative_to(ROOT)
    print(f"\n{GENERATORS} generators: merged P99s (TTFT from the send) within {worst:.3f} ms; rows in {where}")


if __name__ == "__main__":
    main()
