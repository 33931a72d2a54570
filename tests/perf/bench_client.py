"""`make bench-client`: what load generators report, against a server that logs what it truly sent.

The server (known_server.cpp) and each client get one core. Every client keeps N requests of 16/64 tokens open, over
real sockets. True TTFT is from the server's kernel stamp of the request's first bytes to its send of the first chunk;
the client's own send stamp is shown beside it. Further rows: prompts of 65,536 tokens, chunks of four tokens, and a
client that has half of its core, since another process computes there all the time. Prints tables and writes
results/bench-client.json, whose rows name their `case`.

The clients are those of client_tools.py: Redline, and other tools whose interpreters are named there.
STREAMS=16,64 picks other sizes, ROUNDS=4 how many requests a stream, CASE_STREAMS=16 the streams of the further rows.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tests.perf.child_processes import start_child
from tests.perf.client_tools import INPUT, Reported, Run, Tool, redline_command, tools

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "perf"
RESULTS = ROOT / "results" / "bench-client.json"
TOOL_LIMIT_S = 600.0
LONG_PROMPT = 65_536  # tokens
CASES = ("16 tokens in", "64k tokens in", "4 tokens a chunk", "half of a core")
COLUMNS = (
    "case", "tool", "streams", "true_ttft_p50_ms", "ttft_p50_ms", "true_ttft_p99_ms", "ttft_p99_ms", "true_itl_p99_ms",
    "itl_p99_ms", "cpu_us_per_chunk",
)  # fmt: skip


@dataclass(slots=True)
class Truth:
    """What the server logged: times in ns on CLOCK_REALTIME, one entry a request in the order of arrival."""

    received: np.ndarray
    sent: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def read(cls, log: Path, last: int) -> "Truth":
        """The `last` requests received: those before them were the tool's own probes and warm-up."""
        data = np.fromfile(log, dtype=np.int64)
        found, at = [], 0
        while at < len(data):
            count = int(data[at + 1])
            found.append((int(data[at]), data[at + 2 : at + 2 + count]))
            at += 2 + count
        found.sort(key=lambda pair: pair[0])
        found = found[-last:]
        return cls(np.array([r for r, _ in found], dtype=np.int64), [s for _, s in found])

    def ttft_ms(self) -> np.ndarray:
        return np.array([s[0] - r for r, s in zip(self.received, self.sent, strict=True)]) / 1e6

    def itl_ms(self) -> np.ndarray:
        return np.concatenate([np.diff(s) for s in self.sent]) / 1e6

    def chunks(self) -> int:
        return sum(map(len, self.sent))

    def span(self) -> tuple[float, float]:
        """Of the whole load, in seconds of the real-time clock."""
        return float(self.received.min()) / 1e9, float(max(s[-1] for s in self.sent)) / 1e9


class KnownServer:
    """The server on its own core, with the schedule given as flags."""

    def __init__(self, folder: Path, core: int, *flags: str, host: str = "127.0.0.1"):
        self.log = folder / "sent.bin"
        self._host = host
        self._command = [*pinned(core), str(BUILD / "known_server"), "--log", str(self.log), "--host", host, *flags]

    def __enter__(self) -> "KnownServer":
        self._process = start_child(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = f"http://{self._host}:{int(self._process.stdout.readline())}"
        return self

    def cpu_s(self) -> float:
        """CPU time until now."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=30)
        assert self._process.stdout is not None
        self._process.stdout.close()


class CpuMeter:
    """CPU seconds of a session of processes over time, read from /proc at low priority."""

    def __init__(self, session: int):
        self._session = session
        self._ended = threading.Event()
        self._samples: list[tuple[float, dict[int, float]]] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "CpuMeter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def used_s(self, start: float, end: float) -> float:
        """Between two moments of the real-time clock, to the sample (a quarter of a second)."""
        used, before = 0.0, None
        for at, now in self._samples:
            if before is not None and start <= at <= end + 0.25:
                used += sum(max(0.0, seconds - before.get(pid, 0.0)) for pid, seconds in now.items())
            before = now
        return used

    def _watch(self) -> None:
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        tick = os.sysconf("SC_CLK_TCK")
        while not self._ended.wait(0.25):
            found = {}
            for entry in os.listdir("/proc"):
                if not entry.isdigit():
                    continue
                try:
                    fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if int(fields[3]) == self._session:
                    found[int(entry)] = (int(fields[11]) + int(fields[12])) / tick
            self._samples.append((time.time(), found))


def pinned(core: int) -> list[str]:
    return ["taskset", "-c", str(core)]


def cores() -> tuple[int, int]:
    """One for the server, one for the client."""
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) < 2 or shutil.which("taskset") is None:
        sys.exit("bench-client needs two cores and the taskset command: client and server get one core each")
    return mine[0], mine[1]


def build() -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    source, binary = HERE / "known_server.cpp", BUILD / "known_server"
    changed = max(file.stat().st_mtime for file in (source, HERE / "known_answers.h"))
    if not binary.exists() or binary.stat().st_mtime < changed:
        subprocess.run(["g++", "-O2", "-std=c++17", "-Wall", "-Wextra", "-o", binary, source], check=True)


@contextlib.contextmanager
def computing(core: int) -> Iterator[None]:
    """Another process that never sleeps on this core: a fair scheduler leaves half of it to whoever else wants it."""
    process = start_child([*pinned(core), sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(tool: Tool, streams: int, rounds: int, *flags: str, case: str = CASES[0]) -> tuple[Truth, Reported]:
    """One run of a tool against a fresh server; what it said next to what was true."""
    server_core, client_core = cores()
    shared = case == "half of a core"
    tokens = LONG_PROMPT if case == "64k tokens in" else INPUT
    flags += ("--per-chunk", "4") if case == "4 tokens a chunk" else ()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with KnownServer(folder, server_core, *flags) as server:
            run = Run(server.url, streams, streams * rounds, folder, tokens, shared)
            process = start([*pinned(client_core), *tool.command(run)])
            busy = computing(client_core) if shared else contextlib.nullcontext()
            with CpuMeter(process.pid) as meter, busy:
                finish(process, tool.name)
        truth = Truth.read(server.log, run.requests)
        reported = tool.read(run)
    if reported.cpu_us_per_chunk is None:
        reported.cpu_us_per_chunk = meter.used_s(*truth.span()) * 1e6 / truth.chunks()
    return truth, reported


def start(command: Sequence[str]) -> subprocess.Popen[str]:
    """A client in a session of its own, so that all its processes are known."""
    return start_child(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True
    )


def finish(process: subprocess.Popen[str], name: str) -> str:
    try:
        output, _ = process.communicate(timeout=TOOL_LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        sys.exit(f"{name} did not end within {TOOL_LIMIT_S:.0f} s:\n{output[-2000:]}")
    # 1 is also Redline's word for "invalid", and then the tables say so.
    if process.returncode not in (0, 1) or (process.returncode == 1 and "INVALID" not in output):
        sys.exit(f"{name} ended with exit code {process.returncode}:\n{output[-2000:]}")
    return output


def row_of(case: str, tool: str, streams: int, truth: Truth, reported: Reported) -> dict[str, Any]:
    ttft, itl = truth.ttft_ms(), truth.itl_ms()
    values = (
        case, tool, streams, np.percentile(ttft, 50), reported.ttft_p50, np.percentile(ttft, 99), reported.ttft_p99,
        np.percentile(itl, 99), reported.itl_p99, reported.cpu_us_per_chunk,
    )  # fmt: skip
    return dict(zip(COLUMNS, [v if isinstance(v, str | int) else round(float(v), 3) for v in values], strict=True))


def print_row(row: dict[str, Any], note: str) -> None:
    print(
        f"{row['tool']:<17} {row['streams']:>5}   {row['true_ttft_p50_ms']:>8.3f} {row['ttft_p50_ms']:>8.3f}"
        f"   {row['true_ttft_p99_ms']:>8.3f} {row['ttft_p99_ms']:>8.3f}   {row['true_itl_p99_ms']:>8.3f}"
        f" {row['itl_p99_ms']:>8.3f}   {row['cpu_us_per_chunk']:>6.1f}   {note}",
        flush=True,
    )


def sizes(streams: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    print("TTFT 50 ms, ITL 20 ms; latencies in ms, CPU in us a chunk")
    print(f"{'tool':<17} streams  TTFT P50 true/said   TTFT P99 true/said    ITL P99 true/said      CPU")
    rows = []
    for count in streams:
        for tool in tools():
            truth, reported = measure(tool, count, rounds)
            rows.append(row_of(CASES[0], tool.name, count, truth, reported))
            print_row(rows[-1], reported.note)
    return rows


def cases(streams: int, rounds: int) -> list[dict[str, Any]]:
    """What is hard on a client: long prompts, several tokens a chunk, a core that it has to share."""
    rows = []
    for case in CASES[1:]:
        print(f"\n{case}")
        for tool in tools():
            truth, reported = measure(tool, streams, rounds, case=case)
            rows.append(row_of(case, tool.name, streams, truth, reported))
            print_row(rows[-1], reported.note)
    return rows


def stall(streams: int, rounds: int) -> None:
    """Each answer stands still once for 500 ms more than its 20: as a preemption does."""
    print("\none gap of 520 ms in each answer")
    for tool in tools():
        truth, reported = measure(tool, streams, rounds, "--stall-ms", "500", "--stall-at", "32")
        true_p99 = np.percentile(truth.itl_ms(), 99)
        print(f"{tool.name:<17} ITL P99 true {true_p99:.2f} ms, said {reported.itl_p99:.2f} ms", flush=True)


def late_sends() -> None:
    """The generator is stopped for 400 ms in an open loop: its lateness must show, and count."""
    server_core, client_core = cores()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with KnownServer(folder, server_core) as server:
            run = Run(server.url, 0, 0, folder)
            load = ("--rate", "100", "--window", "4", "--vocab-size", "10000")
            process = start([*pinned(client_core), *redline_command(run, *load)])
            path = folder / "run" / "points.csv"
            while not path.exists() and process.poll() is None:
                time.sleep(0.02)  # the first line is the request alone
            time.sleep(3.5)
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(0.4)
            os.kill(process.pid, signal.SIGCONT)
            finish(process, "redline")
        point = pd.read_csv(path).iloc[-1]
        rows = pd.read_parquet(folder / "run" / "requests" / f"{point.point_id}.parquet")
        truth = Truth.read(server.log, len(rows))
    late = rows.sent_s - rows.intended_s
    print("\nopen loop at 100 req/s, the generator stopped for 400 ms")
    many = int((late > 0.01).sum())
    print(f"sends reported up to {late.max() * 1e3:.0f} ms late, {many} of {len(rows)} more than 10 ms")
    print(
        f"highest TTFT: true from arrival at the server {truth.ttft_ms().max():.1f} ms, "
        f"reported from the intended time {rows.ttft_s.max() * 1e3:.1f} ms"
    )
    print(f"the point is {'valid' if point.valid else 'INVALID: ' + point.reason}", flush=True)


def main() -> None:
    streams = [int(n) for n in os.environ.get("STREAMS", "16,64,256,1024").split(",")]
    rounds = int(os.environ.get("ROUNDS", "4"))
    build()
    rows = sizes(streams, rounds) + cases(int(os.environ.get("CASE_STREAMS", "16")), rounds)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    stall(64, rounds)
    late_sends()
    mine = [r for r in rows if r["tool"] == "redline" and r["case"] == CASES[0]]
    worst = max(abs(r[f"{m}_p99_ms"] - r[f"true_{m}_p99_ms"]) for r in mine for m in ("ttft", "itl"))
    print("\nA read of several chunks gives all of them the stamp of its last segment; such reads are counted above.")
    print(f"redline: P99s within {worst:.3f} ms of the truth; rows in {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
