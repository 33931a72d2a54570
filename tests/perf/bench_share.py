"""`make bench-share`: how much of a step passes outside the device, for three model sizes, V1 against V0.

A step here is one token for each of --streams requests that all decode, over HTTP, in windows of equal context. The
device has a processor core of its own; engine core, front end and load generator share the others, so that what they
do delays the device only where it has to wait for them. Reported are, per step: wall time, time the device was busy
(logged by its own thread), the rest of it, and the CPU time of the engine core (its process without the device's
thread) and of the front end (all other processes of the server). Weights are made up. Prints a table, writes
results/bench-share.json and the figure.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import psutil

from bench.loadgen import run_closed_loop
from bench.results.environment import hardware
from bench.target import Target
from bench.target.server import free_port
from bench.workloads import make_workload
from tests.perf.bar_charts import save_figure
from tests.perf.child_processes import start_child
from tests.perf.share_figure import share_figure

ROOT = Path(__file__).parents[2]
MODEL, VOCABULARY = "smollm2-135m", 49_152
INPUT, OUTPUT = 16, 240
FIRST_STEP, LAST_STEP = 32, 224  # the window, in tokens of each request
START_LIMIT_S, LOAD_LIMIT_S = 180.0, 300.0
ENGINES = {"v1": [], "v0": ["--engine", "v0"]}


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """CPU seconds so far at a moment of the monotonic clock."""

    at_ns: int
    core_s: float
    frontend_s: float


@dataclass(slots=True)
class Server:
    """A server under measurement and its processes."""

    url: str
    process: subprocess.Popen[bytes]
    core: int  # process
    device: int  # thread of that process

    def move_host(self, cores: set[int]) -> None:
        """Everything but the device's thread."""
        for pid in [self.core, *self.front_ends()]:
            for thread in threads_of(pid):
                if thread != self.device:
                    os.sched_setaffinity(thread, cores)

    def front_ends(self) -> list[int]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [self.process.pid, *(child.pid for child in children if child.pid != self.core)]

    def cpu_times(self) -> CpuTimes:
        core = sum(cpu_s(self.core, thread) for thread in threads_of(self.core) if thread != self.device)
        frontend = sum(cpu_s(pid, thread) for pid in self.front_ends() for thread in threads_of(pid))
        return CpuTimes(time.monotonic_ns(), core, frontend)


@dataclass(slots=True)
class Sampler:
    """The load generator's observer: notes CPU times as it is called."""

    server: Server
    times: list[CpuTimes] = field(default_factory=list)

    def tick(self, now_s: float, sent: int, first_token: int, finished: int, failed: int) -> bool:
        if first_token == sent and not finished:
            self.times.append(self.server.cpu_times())
        return not failed


def threads_of(pid: int) -> list[int]:
    return [int(name) for name in os.listdir(f"/proc/{pid}/task")]


def cpu_s(pid: int, thread: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0]) / 1e9
    except FileNotFoundError:  # it has just ended
        return 0.0


@contextmanager
def serve(
    folder: Path,
    flags: Sequence[str],
    device_core: int,
    host_cores: set[int],
    *,
    model: str = MODEL,
    environment: dict[str, str] | None = None,
) -> Iterator[Server]:
    """A server whose device has its core to itself. `environment` is added to that of this process."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "tests.perf.share_server", str(device_core), model, "--port", str(port), *flags]
    log = folder / "server.log"
    with log.open("wb") as sink:
        variables = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
        process = start_child(command, cwd=folder, env=variables, stdout=sink, stderr=subprocess.STDOUT)
    try:
        wait_until_up(url, process, log)
        worker = json.loads((folder / "worker.json").read_text())
        server = Server(url, process, worker["process"], worker["thread"])
        server.move_host(host_cores)
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_LIMIT_S
    with httpx.Client(trust_env=False, timeout=2.0) as client:
        while process.poll() is None and time.monotonic() < end:
            try:
                if client.get(f"{url}/health").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
    sys.exit("the server did not start:\n" + "\n".join(log.read_text().splitlines()[-8:]))


def measure(engine: str, layers: int, streams: int, cores: tuple[int, set[int]]) -> dict[str, float]:
    """One run; times in ms a step."""
    flags = ["--load-format", "dummy", "--num-layers", str(layers), "--max-num-seqs", str(streams)]
    flags += ["--max-model-len", str(INPUT + OUTPUT + 8), *ENGINES[engine]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serve(folder, flags, *cores) as server:
            specs = make_workload({"kind": "random", "input": INPUT, "output": OUTPUT}, VOCABULARY).requests(streams, 1)
            sampler = Sampler(server)
            target = Target(server.url, MODEL)
            recording = run_closed_loop(target, specs, streams, observer=sampler, time_limit_s=LOAD_LIMIT_S)
        log = folder / "device.bin"
        if not log.exists():
            sys.exit(f"the core left no log of its device:\n{(folder / 'server.log').read_text()[-2000:]}")
        device = np.fromfile(log, dtype=np.int64).reshape(-1, 3)
    bad = [row.status for row in recording.records((-1.0, float("inf"))) if row.status != "ok"]
    if bad:
        sys.exit(f"{len(bad)} of {streams} requests failed: {bad[0]}")
    return per_step(device, sampler.times, streams)


def per_step(device: np.ndarray, times: Sequence[CpuTimes], streams: int) -> dict[str, float]:
    """What a step took between the first and the last sample of the window; `device` as share_core.py logs it."""
    begins, ends, tokens = device.T
    steps_by = np.cumsum(tokens) / streams
    inside = [t for t in times if FIRST_STEP <= steps_at(t.at_ns, ends, steps_by) <= LAST_STEP]
    if len(inside) < 2:
        sys.exit("the window was too short to be sampled twice")
    first, last = inside[0], inside[-1]
    steps = steps_at(last.at_ns, ends, steps_by) - steps_at(first.at_ns, ends, steps_by)
    busy = np.minimum(ends, last.at_ns) - np.maximum(begins, first.at_ns)
    wall_ms = (last.at_ns - first.at_ns) / 1e6 / steps
    device_ms = float(np.maximum(busy, 0).sum()) / 1e6 / steps
    return {
        "step_ms": wall_ms,
        "device_ms": device_ms,
        "outside_ms": wall_ms - device_ms,
        "core_ms": (last.core_s - first.core_s) * 1e3 / steps,
        "frontend_ms": (last.frontend_s - first.frontend_s) * 1e3 / steps,
        "steps": steps,
    }


def steps_at(at_ns: int, ends: np.ndarray, steps_by: np.ndarray) -> float:
    done = int(np.searchsorted(ends, at_ns, "right"))
    return float(steps_by[done - 1]) if done else 0.0


def row_of(engine: str, layers: int, streams: int, runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    middle = {key: round(median(run[key] for run in runs), 4) for key in runs[0]}
    shares = [run["outside_ms"] / run["step_ms"] for run in runs]
    return {
        "model": MODEL,
        "layers": layers,
        "engine": engine,
        "streams": streams,
        **middle,
        "outside_share": round(median(shares), 4),
        "outside_share_low": round(min(shares), 4),
        "outside_share_high": round(max(shares), 4),
        "rounds": len(runs),
        "hardware": f"{hardware()['cpu']}, 1 core as device, {len(os.sched_getaffinity(0)) - 1} for the rest",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 30])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turn; medians are reported")
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/bench-share.png"))
    given = parser.parse_args()
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(usable) < 2 or not Path("/proc/self/schedstat").exists():
        sys.exit("bench-share needs Linux and at least two cores: one for the device, one for the rest")
    cores = usable[-1], set(usable[:-1])
    runs: dict[tuple[int, str], list[dict[str, float]]] = {}
    print("per step, ms        step   device  outside     core  front end   outside the device", flush=True)
    for _ in range(given.rounds):
        for layers in given.layers:
            for engine in ENGINES:
                run = measure(engine, layers, given.streams, cores)
                runs.setdefault((layers, engine), []).append(run)
                shown = "  ".join(f"{run[key]:7.2f}" for key in ("step_ms", "device_ms", "outside_ms", "core_ms"))
                share = run["outside_ms"] / run["step_ms"]
                print(f"{layers:>3} layers, {engine}  {shown}    {run['frontend_ms']:7.2f}   {share:.1%}", flush=True)
    rows = [row_of(engine, layers, given.streams, found) for (layers, engine), found in runs.items()]
    path = Path("results") / "bench-share.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
    save_figure(share_figure, path, given.figure)
    print(f"rows in {path}, figure in {given.figure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
