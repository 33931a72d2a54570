"""`make bench-replicas`: replicas that are killed, added and drained under load: what fails, what is left behind.

Two servers with CLIENTS=8 clients, MODEL=smollm2-135m. The first has two replicas, of which one is ended by SIGKILL
every PERIOD=5 seconds for SECONDS=120: only requests that it was working on may fail. The second one is scaled from 1
to 3 replicas and back by `redline scale`: no request may fail. Then nothing may be left of either: processes, sockets,
shared memory, file descriptors. Prints what happened and writes results/bench-replicas.json; exit code 1 if not so.
"""

import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from tests.perf.replica_load import Asked, Family, Kill, Load, kill_replicas, serving, traces, unexplained
from tests.serving import Served, serve

RESULTS = Path("results") / "bench-replicas.json"
FLAGS = ("--max-model-len", "512", "--max-num-seqs", "16", "--api-servers", "2", "--disable-log-requests")
TOKENS = 96
SETTLE_S = 60.0
DESCRIPTORS_S = 10.0

Part = Callable[[Served, Load], Awaitable[list[Kill]]]


def health_of(served: Served) -> Callable[[], dict[str, Any]]:
    def read() -> dict[str, Any]:
        found: dict[str, Any] = served.client.get("/health").json()
        return found

    return read


async def settle(served: Served, replicas: int) -> None:
    """Wait until so many replicas serve."""
    deadline = time.monotonic() + SETTLE_S
    while len(serving(await asyncio.to_thread(health_of(served)))) != replicas:
        assert time.monotonic() < deadline, f"{replicas} replicas do not serve: {health_of(served)()}"
        await asyncio.sleep(0.2)


async def scale(url: str, replicas: int) -> str:
    """`redline scale`; what it prints."""
    command = [sys.executable, "-m", "cli.main", "scale", url, "--dp", str(replicas)]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=asyncio.subprocess.STDOUT)
    output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output
    return output


async def under_load(served: Served, clients: int, tokens: int, part: Part) -> tuple[list[Asked], list[Kill]]:
    """Run a part while clients ask."""
    load = Load(served.url, tokens)
    asking = asyncio.ensure_future(load.run(clients))
    try:
        kills = await part(served, load)
    finally:
        load.stop()
    await asking
    return load.asked, kills


def run_part(
    name: str, model: str, flags: tuple[str, ...], clients: int, tokens: int, replicas: int, part: Part
) -> tuple[dict[str, Any], list[str]]:
    """Serve, run a part, end the server; returns a row, and what is wrong."""
    with tempfile.TemporaryDirectory(prefix="r-") as folder:
        before = traces(Path(folder))
        with serve(Path(folder), model, *flags, env={"TMPDIR": folder}) as served:
            family = Family(served.process.pid)
            family.look()

            async def run() -> tuple[list[Asked], list[Kill], int, int]:
                await under_load(served, 1, tokens, lambda *_: asyncio.sleep(2.0, []))
                began = family.descriptors
                found = await under_load(served, clients, tokens, part)
                await settle(served, replicas)
                family.look()
                deadline = time.monotonic() + DESCRIPTORS_S
                while family.descriptors > began and time.monotonic() < deadline:  # connections end a moment later
                    await asyncio.sleep(0.1)
                return *found, began, family.descriptors

            asked, kills, began, ended = asyncio.run(run())
            restarts = served.metric("redline:core_restarts_total")
            output = served.output()
        wrong = unexplained(asked, kills)
        wrong += family.left()
        wrong += [f"{one} is left behind" for one in sorted(traces(Path(folder)) - before) if not one.endswith(".log")]
        if ended > began:
            wrong.append(f"the server has {ended} file descriptors, {began} before")
    if wrong:
        print(output[-3000:])
    times = sorted(one.end - one.begin for one in asked if not one.error)
    row = {
        "part": name, "requests": len(asked), "failed": sum(bool(one.error) for one in asked), "kills": len(kills),
        "restarts": restarts, "unexplained": wrong, "median_s": median(times), "longest_s": times[-1],
        "descriptors_before": began, "descriptors_after": ended, "killed": [asdict(one) for one in kills],
    }  # fmt: skip
    return row, wrong


async def scale_up_and_down(served: Served, _load: Load) -> list[Kill]:
    await asyncio.sleep(2.0)
    for replicas in (3, 1):
        print(f"scale to {replicas}: {' | '.join((await scale(served.url, replicas)).splitlines())}")
        await asyncio.sleep(3.0)
    return []


def main() -> int:
    model, clients = os.environ.get("MODEL", "smollm2-135m"), int(os.environ.get("CLIENTS", "8"))
    seconds, period = float(os.environ.get("SECONDS", "120")), float(os.environ.get("PERIOD", "5"))

    async def kill(served: Served, _load: Load) -> list[Kill]:
        return await kill_replicas(health_of(served), period, max(1, round(seconds / period)), random.Random(1))

    killed = run_part("kill", model, (*FLAGS, "--dp", "2", "--restart-on-failure", "100"), clients, TOKENS, 2, kill)
    scaled = run_part("scale", model, FLAGS, clients, TOKENS, 1, scale_up_and_down)
    rows = [killed[0], scaled[0]]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['part']}: {row['requests']} requests, {row['failed']} failed with {row['kills']} kills, "
            f"{len(row['unexplained'])} faults; median {row['median_s']:.2f} s, longest {row['longest_s']:.2f} s"
        )
    for fault in (*killed[1], *scaled[1]):
        print(f"FAULT: {fault}")
    return 1 if killed[1] or scaled[1] else 0


if __name__ == "__main__":
    sys.exit(main())
