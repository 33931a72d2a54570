"""`make bench-generators`: what two generators report together, against a server that logs what it truly sent.

The server (known_server.cpp) has one core, and the run and its generators share the other one. Each load is sent once
by the run itself and once by two generators on loopback, in closed loops of N streams and in open loops of R requests
per second, of 16/64 tokens. True TTFT and ITL are as in bench_client.py. In an open loop TTFT counts from the intended
time, so a row also has its P99 from the send, which is what the server can know, and the P99 of the lateness. The last
column is the error of the clocks of the generators, as the run compared them.
Prints a table and writes results/bench-generators.json. STREAMS=16,64 and RATES=50,200 pick other loads, RUNS=3 repeats
them. More than 1,000 streams, such as STREAMS=10000 RATES=, are another load: see generator_streams.py.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.generators.handshake import TOKEN_VARIABLE
from tests.perf.bench_client import ROOT, KnownServer, Truth, build, cores, finish, pinned, start
from tests.perf.client_tools import Run, redline_command
from tests.perf.generator_hosts import Host, running_generators
from tests.perf.generator_streams import measure_streams

RESULTS = ROOT / "results" / "bench-generators.json"
GENERATORS = 2
ROUNDS = 4  # requests of each stream
MOST_AT_ONCE = 1024  # streams of a closed loop, whose tokens come 50 times a second


def measure(case: str, load: tuple[str, ...], count: int) -> dict[str, Any]:
    """One load against a fresh server, by `count` generators, or by the run itself if it is 0."""
    server_core, client_core = cores()
    places = (Host("127.0.0.1"),) * count
    with tempfile.TemporaryDirectory() as name, running_generators(places, pinned(client_core)) as generators:
        folder = Path(name)
        with KnownServer(folder, server_core) as server:
            named = ("--generators", ",".join(one.address for one in generators)) if count else ()
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
    few = [n for n in streams_asked() if n <= MOST_AT_ONCE]
    closed = [(f"{n} streams", ("--concurrency", str(n), "--num-requests", str(n * ROUNDS))) for n in few]
    opened = [(f"{r:g} req/s", ("--rate", f"{r:g}", "--window", "12")) for r in asked("RATES", "20,100")]
    return (closed + opened) * int(os.environ.get("RUNS", "1"))


def asked(variable: str, usual: str) -> list[float]:
    return [float(text) for text in os.environ.get(variable, usual).split(",") if text]


def streams_asked() -> list[int]:
    return [int(number) for number in asked("STREAMS", "16,64,256")]


def main() -> None:
    os.environ[TOKEN_VARIABLE] = "the token of this benchmark"
    build()
    rows = few_streams() + [measure_streams(n, GENERATORS) for n in streams_asked() if n > MOST_AT_ONCE]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\nrows in {RESULTS.relative_to(ROOT)}")


def few_streams() -> list[dict[str, Any]]:
    """Rows of all loads, each without generators and with them."""
    chosen = loads()
    if not chosen:
        return []
    print("TTFT 50 ms, ITL 20 ms; P99 in ms")
    print("load         generators   TTFT true      said from send  ITL true      said   late   clock")
    rows = []
    for case, load in chosen:
        for count in (0, GENERATORS):
            rows.append(measure(case, load, count))
            print_row(rows[-1])
    mine = [row for row in rows if row["generators"]]
    pairs = (("ttft_p99_ms", "true_ttft_p99_ms"), ("itl_p99_ms", "true_itl_p99_ms"))
    worst = max(abs(row[said] - row[true]) for row in mine for said, true in pairs)
    print(f"\n{GENERATORS} generators: merged P99s within {worst:.3f} ms of the truth")
    return rows


if __name__ == "__main__":
    main()
