"""`redline serve` on the GPU and `redline bench` against it, as a user runs them."""

import csv
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any

from tests.gpu.environment import Environment
from tests.gpu.rows import SkipError
from tests.serving import Served, serve

BENCH_S = 400.0
CAPTURE_S = 15.0


def serve_load(env: Environment, load: str) -> None:
    """One load on the server, which the items of a process share."""
    if load not in env.sizes.loads:
        raise SkipError("not on the stand-in")
    served, what = _served(env), env.sizes.loads[load]
    out = env.folder / f"bench-{list(env.sizes.loads).index(load)}"
    command = [sys.executable, "-m", "cli.main", "bench", "--url", served.url, "--out", str(out)]
    command += ["--input", str(what.prompt), "--output", str(what.output)]
    if what.concurrency:
        command += ["--concurrency", str(what.concurrency), "--num-requests", str(what.requests)]
    else:
        rates = ",".join(f"{rate:g}" for rate in what.rates)
        command += ["--rates", rates, "--window", f"{what.window_s:g}", "--no-ladder"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BENCH_S, check=False)
    if done.returncode not in (0, 4):
        raise RuntimeError(f"bench: exit status {done.returncode}: {(done.stderr or done.stdout)[-300:]}")
    with (out / "points.csv").open() as file:
        points = [point for point in csv.DictReader(file) if point["phase"] != "probe"]
    for point in points:
        _report(env, point)
    if what.least is not None:
        env.report.row("highest sustained of these rates", highest_sustained(points), "req/s", at_least=what.least)


def highest_sustained(points: list[dict[str, str]]) -> float:
    """The highest rate of points.csv that was sustained; 0 if none was."""
    return max((float(point["rate"]) for point in points if point["sustained"] == "true"), default=0.0)


def _report(env: Environment, point: dict[str, str]) -> None:
    closed = bool(point["concurrency"])
    name = f"{point['concurrency']} at a time" if closed else f"{float(point['rate']):g} req/s"
    verdict = "" if closed else f", {point['verdict'] or 'not judged'}"
    note = (
        f"{float(point['output_tok_s']):.0f} output tokens/s, TTFT P99 {float(point['ttft_p99_ms']):.0f} ms, "
        f"ITL P50 {float(point['itl_p50_ms']):.1f} P99 {float(point['itl_p99_ms']):.1f} ms{verdict}"
    )
    failed = int(point["failed"])
    env.report.row(name, float(point["achieved_rate"]), "req/s", note=note, detail=point)
    env.report.row(f"{name}, failed requests", failed, at_most=0, note=point["failures"])


def _served(env: Environment) -> Served:
    if "served" not in env.kept:
        stack = ExitStack()
        env.kept.setdefault("close", []).append(stack.close)
        device = "cpu" if env.stand_in else "cuda"
        flags = ["--device", device, "--load-format", "dummy", "--max-model-len", str(env.sizes.max_model_len)]
        flags += env.sizes.flags
        # The interpreter of Triton is too slow for a server; on the stand-in it is the CPU's.
        served = stack.enter_context(serve(env.folder, str(env.model_folder()), *flags))
        env.kept["served"] = served
        if not env.stand_in:  # steps are captured while no request comes
            time.sleep(CAPTURE_S)
        for line in served.output().splitlines():
            if "kernels" in line or "graphs" in line:
                env.report.row("start table", " ".join(line.split()))
    found: Any = env.kept["served"]
    assert isinstance(found, Served)
    return found
