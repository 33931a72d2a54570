"""`make bench-start`: seconds and CPU seconds of a server's start to its first token.

Servers of MODEL=smollm2-135m in bf16, int8 and int4 start one after the other, ROUNDS=5 times, with everything in the
page cache and the caches of kernels and packed weights filled. BASE=… is the folder of another version, whose starts
alternate with these. FIRST=1 starts each form once with an empty cache instead, so that kernels are compiled and int4
weights are quantized. Prints a table of medians and writes results/bench-start.json.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from bench.target.server import free_port
from tests.perf.child_processes import start_child

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("results") / "bench-start.json"
FORMS = {"bf16": (), "int8": ("--quantization", "int8"), "int4": ("--quantization", "int4")}
LEDGER = re.compile(r"started in [\d.]+ s: (.*)")
STOP_S = 30.0


@dataclass(frozen=True)
class Start:
    """One start. Seconds are since the process was spawned, CPU seconds up to the first token."""

    version: str
    form: str
    ready_s: float
    token_s: float
    server_cpu_s: float
    core_cpu_s: float
    compiler_cpu_s: float
    phases: dict[str, float]


def start(version: str, folder: Path, form: str, model: str, environment: dict[str, str]) -> Start:
    """Start a server of a version, take its first token, and end it."""
    port = free_port()
    command = [sys.executable, "-m", "cli.main", "serve", model, "--port", str(port), *FORMS[form]]
    environment = {**os.environ, **environment, "PYTHONPATH": str(folder)}
    began = time.monotonic()
    with start_child(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            assert server.stdout is not None
            said = []
            for line in server.stdout:
                said.append(line)
                if found := LEDGER.search(line):
                    break
            else:
                sys.exit("the server did not start; it said:\n" + "".join(said[-20:]))
            ready = time.monotonic() - began
            body = {"model": model, "prompt": "The", "max_tokens": 1}
            httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60).raise_for_status()
            token = time.monotonic() - began
            cpu = [psutil.Process(server.pid).cpu_times(), *(one.cpu_times() for one in children(server.pid))]
        finally:
            server.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                server.wait(STOP_S)
            server.kill()
    parts = (part.rsplit(maxsplit=2) for part in found.group(1).split(", "))
    phases = {name: float(seconds) for name, seconds, _ in parts}
    server_cpu, core_cpu = (one.user + one.system for one in cpu)
    return Start(
        version, form, ready, token, server_cpu, core_cpu, cpu[1].children_user + cpu[1].children_system, phases
    )


def children(pid: int) -> list[psutil.Process]:
    """The EngineCore of a server."""
    found = psutil.Process(pid).children()
    assert len(found) == 1, found
    return found


@contextmanager
def empty_cache(model: str) -> Iterator[dict[str, str]]:
    """The environment of a server that finds the model, and nothing else, in the cache."""
    models = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "redline" / "models"
    with tempfile.TemporaryDirectory() as folder:
        if (models / model).is_dir():
            (Path(folder) / "redline" / "models").mkdir(parents=True)
            (Path(folder) / "redline" / "models" / model).symlink_to(models / model)
        yield {"XDG_CACHE_HOME": folder}


def table_of(starts: list[Start]) -> Table:
    table = Table(
        "version", "form", "ready", "first token", "CPU: server", "CPU: core", "CPU: compiler", "core's phases"
    )
    for version, form in dict.fromkeys((one.version, one.form) for one in starts):
        group = [one for one in starts if (one.version, one.form) == (version, form)]
        values = [
            median(getattr(one, name) for one in group)
            for name in ("ready_s", "token_s", "server_cpu_s", "core_cpu_s", "compiler_cpu_s")
        ]
        names = dict.fromkeys(name for one in group for name in one.phases)
        phases = {name: median(one.phases.get(name, 0.0) for one in group) for name in names}
        shown = ", ".join(f"{name} {seconds:.2f}" for name, seconds in phases.items() if seconds >= 0.05)
        table.add_row(version, form, *(f"{value:.2f}" for value in values), shown)
    return table


def main() -> None:
    model, rounds = os.environ.get("MODEL", "smollm2-135m"), int(os.environ.get("ROUNDS", "5"))
    versions = {"this": ROOT}
    if base := os.environ.get("BASE"):
        versions = {"base": Path(base).resolve(), **versions}
    RESULTS.parent.mkdir(exist_ok=True)
    starts: list[Start] = []

    def measure(version: str, form: str, environment: dict[str, str]) -> None:
        starts.append(start(version, versions[version], form, model, environment))
        RESULTS.write_text(json.dumps([asdict(one) for one in starts], indent=1))

    if os.environ.get("FIRST"):
        for form, version in itertools.product(FORMS, versions):
            with empty_cache(model) as environment:
                measure(version, form, environment)
    else:
        for form, (version, folder) in itertools.product(FORMS, versions.items()):  # fills the caches
            start(version, folder, form, model, {})
        for _, form, version in itertools.product(range(rounds), FORMS, versions):
            measure(version, form, {})
    Console(width=200).print(table_of(starts))


if __name__ == "__main__":
    main()
