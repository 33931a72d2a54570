"""`python -m tests.cluster.serving_replicas FOLDER HOST:PORT SIGNAL_FILE`: two replicas on Ray nodes, one is lost.

Serves two replicas, one on each node, and asks. Then waits for SIGNAL_FILE, by which the caller reports that it has
ended the second node, and until its replica runs on the first one. Then ends an EngineCore, and waits until another
one serves. Prints JSON as the last line.
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.serving import Served, serve

PROMPTS = [f"{number} is a prompt" for number in range(4)]
BODY: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
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


def main(model: str, address: str, signal_file: str) -> None:
    flags = (
        "--load-format", "dummy", "--dtype", "float32", "--max-model-len", "1K", "--kv-cache-memory-bytes", "8MiB",
        "--dp", "2", "--api-servers", "2", "--distributed-executor-backend", "ray", "--ray-address", address,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder), model, *flags) as served:
        tokens = [ask(served)]
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
        output = served.output()
    found = {"tokens": tokens, "noticed_s": noticed, "restarts": restarts, "output": output}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
