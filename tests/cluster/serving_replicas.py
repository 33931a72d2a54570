"""`python -m tests.cluster.serving_replicas FOLDER HOST:PORT SIGNAL_FILE DISK`: two replicas on Ray nodes, one is lost.

Serves two replicas, one on each node, which keep evicted KV blocks in a folder DISK, and asks. Then waits for
SIGNAL_FILE, by which the caller reports that it has ended the second node, and until its replica runs on the first one.
Then ends an EngineCore, and waits until another one serves. Then drains a replica and adds another under load, and more
than there are CPUs. Prints JSON as the last line.
"""

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.perf.bench_replicas import scale, settle, under_load
from tests.perf.replica_load import Kill, Load
from tests.serving import Served, serve

# Each takes 13 blocks; the KV cache of a replica holds two.
PROMPTS = [[(7 * i + 13 * number) % 120 + 1 for i in range(200 + number)] for number in range(8)]
NEW, BLOCK = 6, 16
BLOCKS = 36
SIZES = {"max_model_len": 512, "block_size": BLOCK, "max_num_seqs": 4}
BLOCK_BYTES = BLOCK * 256  # of the tiny model, in float32
BODY: dict[str, Any] = {"max_tokens": NEW, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
WAIT_S = 150.0


def ask(served: Served) -> list[list[int]]:
    return [
        served.post("/v1/completions", prompt=prompt, **BODY)["choices"][0]["token_ids"] for prompt in PROMPTS
    ]  # fmt: skip


def statuses(served: Served) -> list[str]:
    return [one["status"] for one in served.client.get("/health").json()["replicas"]]


def wait_for(served: Served, *what: str) -> float:
    """Wait for the statuses of the replicas, in any order; seconds that it took."""
    begin = time.monotonic()
    while (found := sorted(statuses(served))) != sorted(what):
        assert time.monotonic() - begin < WAIT_S, f"{found}:\n{served.output()}"
        time.sleep(0.1)
    return time.monotonic() - begin


def scale_under_load(served: Served) -> list[str]:
    """Drain a replica and add one; the errors of requests."""

    async def part(_served: Served, _load: Load) -> list[Kill]:
        for replicas in (1, 2):
            assert f"{replicas} replica" in await scale(served.url, replicas)
            await settle(served, replicas)
        return []

    try:
        asked, _ = asyncio.run(under_load(served, 3, 40, part))
    except Exception:
        print(served.output()[-20000:], served.process.poll())
        raise
    assert len(asked) > 3
    return [one.error for one in asked if one.error]


def refused_scale(served: Served, replicas: int) -> str:
    """The error of more replicas than there are CPUs; two are left."""
    served.post("/scale", data_parallel_size=replicas)
    begin = time.monotonic()
    while not (state := served.client.get("/scale").json())["error"]:
        assert time.monotonic() - begin < WAIT_S
        time.sleep(0.1)
    served.post("/scale", data_parallel_size=2)  # one of them may have been added
    wait_for(served, "ok", "ok")
    return str(state["error"])


def main(model: str, address: str, signal_file: str, disk: str) -> None:
    flags = (
        "--load-format", "dummy", "--dtype", "float32", "--kv-cache-memory-bytes", str(2 * BLOCKS * BLOCK_BYTES),
        *(word for name, value in SIZES.items() for word in (f"--{name.replace('_', '-')}", str(value))),
        "--kv-spill", f"host={2 * BLOCKS * BLOCK_BYTES},disk={disk}:{2 * 300 * BLOCK_BYTES}", "--distribute-weights",
        "--dp", "2", "--api-servers", "2", "--distributed-executor-backend", "ray", "--ray-address", address,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder), model, *flags) as served:
        tokens = [ask(served), ask(served)]
        hits = served.metric("redline:kv_spill_hits_total")
        folders = len(os.listdir(disk))
        print("serving", flush=True)
        while not Path(signal_file).exists():
            time.sleep(0.1)
        noticed = wait_for(served, "ok", "restarting")
        tokens.append(ask(served))
        wait_for(served, "ok", "ok")
        tokens.append(ask(served))
        os.kill(served.client.get("/health").json()["replicas"][0]["process"], signal.SIGKILL)
        wait_for(served, "ok", "restarting")
        wait_for(served, "ok", "ok")
        tokens.append(ask(served))
        restarts = served.metric("redline:core_restarts_total")
        failed, refused = scale_under_load(served), refused_scale(served, 3)
        tokens.append(ask(served))
        output = served.output()
    found = {
        "tokens": tokens, "noticed_s": noticed, "restarts": restarts, "output": output, "hits": hits,
        "folders": folders, "failed": failed, "refused": refused,
    }  # fmt: skip
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
