"""`make bench-streams`: 1,000 streams at the same time, and bodies of 40 MB: is one lost, how long does /health take?

A server of MODEL=smollm2-135m, started with a limit of 1,024 open files as shells have it, gets STREAMS=1000 streamed
requests at once. This process sends and reads them, another one asks for /health ten times a second and reads the
memory of the server's processes. Phases:

    idle      nothing else
    queued    all streams at once; the server runs as many as it does by default, the others wait
    again     the same, to see whether memory grows
    all run   the same on a server that runs all of them (--max-num-seqs)
    bodies    16 streams decode while bodies of 40 MB come one after the other: refused by their length, sent in chunks
              without one, and, on a server that takes them (--max-body-bytes), texts, chats, token ids and nested lists

Rows go to results/bench-streams.json: phase, streams, complete, lost, tokens, tokens_missing, seconds, tok_s,
health_p50_ms, health_p99_ms, health_max_ms, front_mb and core_mb before, at most and after, and how long the server's
event loop (front_queued_s) and the process that asks for /health (watch_queued_s) waited for a core. TOKENS=64 is the
length of an output. Exit code 1 if a stream or a token is missing, or if the P99 of /health is 100 ms or more in a
phase.
"""

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bench.loadgen import Recording, run_closed_loop
from bench.results.environment import hardware
from bench.workloads import make_workload
from bench.workloads.base import RequestSpec
from engine.model.resolve import resolve_model
from tests.perf.cpu_process import Server
from tests.perf.cpu_tables import new_table
from tests.perf.streams_bodies import BODIES, MEGABYTES, Sender
from tests.perf.streams_watch import Seen, Watch

RESULTS = Path("results") / "bench-streams.json"
INPUT = 16
OPEN_FILES = 1024
BESIDE, BESIDE_TOKENS = 16, 2000  # streams while bodies come; they are ended with the last body
IDLE_S, REST_S = 5.0, 3.0
HEALTH_LIMIT_MS = 100.0
RUN_LIMIT_S = 600.0
COLUMNS = (
    "phase", "streams", "complete", "lost", "tokens", "seconds", "tok_s", "health_p50_ms", "health_p99_ms",
    "health_max_ms", "front_queued_s", "watch_queued_s", "front_mb", "core_mb",
)  # fmt: skip


class UntilDone:
    """The load generator's observer: ends the run when `over` returns true."""

    def __init__(self, over: Callable[[], bool] = lambda: False):
        self._over = over

    def tick(self, now_s: float, sent: int, first_token: int, finished: int, failed: int) -> bool:
        return not self._over()


class Bench:
    """Measures phases on one server after the other, and keeps their rows."""

    def __init__(self, model: Path, streams: int, tokens: int, folder: Path):
        self._model, self._streams, self._tokens, self._folder = model, streams, tokens, folder
        self._vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        self.rows: list[dict[str, Any]] = []
        self.wrong: list[str] = []

    def specs(self, count: int, tokens: int, seed: int) -> list[RequestSpec]:
        kind = {"kind": "random", "input": INPUT, "output": tokens}
        return make_workload(kind, self._vocabulary).requests(count, seed)

    def server(self, name: str, *flags: str) -> Server:
        """A server with as few open files as many shells allow."""
        serve = [sys.executable, "-m", "cli.main", "serve", str(self._model), "--port", "{port}"]
        given = [*serve, "--served-model-name", "model", "--disable-log-requests", "--max-model-len", "2112", *flags]
        command = ["sh", "-c", f'ulimit -Sn {OPEN_FILES} && exec "$@"', "sh", *given]
        return Server(name, command, {"PYTHONPATH": os.getcwd()}, self._folder / f"{name}.log", "model")

    def watched(self, server: Server) -> Watch:
        host, port = server.target.base_url.removeprefix("http://").split(":")
        return Watch(host, int(port), server.process.pid)

    def idle(self, watch: Watch) -> None:
        time.sleep(IDLE_S)
        watch.take()
        time.sleep(IDLE_S)
        self._add("idle", watch.take(), IDLE_S)

    def streams(self, phase: str, server: Server, watch: Watch, seed: int) -> None:
        """All streams at once, to their ends."""
        specs = self.specs(self._streams, self._tokens, seed)
        watch.take()
        began = time.monotonic()
        recording = run_closed_loop(
            server.target, specs, len(specs), observer=UntilDone(), time_limit_s=RUN_LIMIT_S, processes=1
        )
        seconds = time.monotonic() - began
        time.sleep(REST_S)
        seen = watch.take()
        self._add(phase, seen, seconds, recording, specs)
        self._check_health(phase, seen)

    def bodies(self, server: Server, watch: Watch, names: Sequence[str]) -> None:
        """Bodies one after the other, while a few streams decode; a row for each kind of body."""
        for name in names:
            watch.take()
            specs = self.specs(BESIDE, BESIDE_TOKENS, 99)
            with Sender(server.target.base_url, name) as sender:
                began = time.monotonic()
                run_closed_loop(
                    server.target, specs, len(specs), observer=UntilDone(sender.is_over), time_limit_s=RUN_LIMIT_S
                )
                seconds = time.monotonic() - began
                answers = sender.answers()
            seen = watch.take()
            phase = f"{MEGABYTES} MB, {name}"
            self._add(phase, seen, seconds)
            self._check_health(phase, seen)
            self.rows[-1] |= {"statuses": [status for status, _ in answers], "answer_s": [s for _, s in answers]}
            self.wrong += [f"{phase}: status {status}" for status, _ in answers if not 400 <= status < 500]

    def _check_health(self, phase: str, seen: Seen) -> None:
        p99 = 1e3 * float(np.percentile(seen.health_s, 99))
        if p99 >= HEALTH_LIMIT_MS:
            self.wrong.append(f"{phase}: the P99 of /health is {p99:.0f} ms")
        self.wrong += [f"{phase}: {failure}" for failure in seen.failures[:3]]

    def _add(
        self,
        phase: str,
        seen: Seen,
        seconds: float,
        recording: Recording | None = None,
        specs: Sequence[RequestSpec] = (),
    ) -> None:
        records = [] if recording is None else recording.records((-1.0, float("inf")))
        complete = [one for one in records if one.status == "ok" and one.output_tokens == one.asked_output_tokens]
        tokens = sum(one.output_tokens for one in records)
        missing = sum(spec.output_tokens for spec in specs) - tokens
        if recording is not None and (len(complete) < len(specs) or missing):
            bad = next((one for one in records if one not in complete), None)
            cause = "" if bad is None else f", the first: {bad.status} {bad.error} after {bad.output_tokens} tokens"
            self.wrong.append(f"{phase}: {len(specs) - len(complete)} streams and {missing} tokens are missing{cause}")
        p50, p99 = np.percentile(seen.health_s, [50, 99])
        row = {
            "phase": phase, "streams": len(specs), "complete": len(complete), "lost": len(specs) - len(complete),
            "tokens": tokens, "tokens_missing": missing, "seconds": round(seconds, 1),
            "tok_s": round(tokens / seconds, 1), "health_p50_ms": round(1e3 * p50, 1),
            "health_p99_ms": round(1e3 * p99, 1), "health_max_ms": round(1e3 * max(seen.health_s), 1),
            "health_answers": len(seen.health_s),
            "front_queued_s": spent(seen.queued_ns), "watch_queued_s": spent(seen.own_queued_ns),
            **{f"{name}_mb": memory(values) for name, values in (("front", seen.front), ("core", seen.core))},
            "hardware": f"{hardware()['cpu']}, {hardware()['cores']} cores",
        }  # fmt: skip
        self.rows.append(row)
        print("  ".join(f"{key} {row[key]}" for key in COLUMNS), flush=True)


def memory(values: Sequence[int]) -> list[float]:
    """Before, at most, after; MB of 10^6 bytes."""
    return [round(one / 1e6, 1) for one in (values[0], max(values), values[-1])]


def spent(nanoseconds: Sequence[int]) -> float:
    """Seconds between the first and the last reading of a counter."""
    return round((nanoseconds[-1] - nanoseconds[0]) / 1e9, 2)


@contextmanager
def started(server: Server) -> Iterator[Server]:
    """A server that is ended with the block."""
    server.start()
    try:
        yield server
    finally:
        server.stop()


def run(bench: Bench, streams: int, phases: Sequence[str]) -> None:
    if "queued" in phases:
        with started(bench.server("default")) as server, bench.watched(server) as watch:
            bench.idle(watch)
            for seed, phase in enumerate(("queued", "again")):
                bench.streams(phase, server, watch, seed)
            grown = bench.rows[-1]["front_mb"][-1] - bench.rows[-2]["front_mb"][-1]
            print(f"the API process keeps {grown:+.1f} MB more after the second time")
            bench.bodies(server, watch, [name for name, body in BODIES.items() if not body.taken])
    if "all run" in phases:
        with started(bench.server("all-run", "--max-num-seqs", str(streams))) as server, bench.watched(server) as watch:
            bench.streams("all run", server, watch, 2)
    if "bodies" in phases:
        with started(bench.server("bodies", "--max-body-bytes", "64MiB")) as server, bench.watched(server) as watch:
            bench.bodies(server, watch, [name for name, body in BODIES.items() if body.taken])


def show(rows: list[dict[str, Any]]) -> None:
    table = new_table("1,000 streams, and large bodies", *COLUMNS)
    for row in rows:
        table.add_row(*(" / ".join(map(str, row[key])) if key.endswith("_mb") else str(row[key]) for key in COLUMNS))
    Console(width=170, highlight=False).print(table)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # by way of what ends the servers
    streams, tokens = int(os.environ.get("STREAMS", "1000")), int(os.environ.get("TOKENS", "64"))
    phases = os.environ.get("PHASES", "queued,all run,bodies").split(",")
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(resolve_model(os.environ.get("MODEL", "smollm2-135m")), streams, tokens, Path(name))
        run(bench, streams, phases)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(bench.rows, indent=1) + "\n")
    show(bench.rows)
    for line in bench.wrong:
        print(f"FAILED: {line}")
    return 1 if bench.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
