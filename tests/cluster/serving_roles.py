"""`python -m tests.cluster.serving_roles FOLDER HOST:PORT SIGNAL_FILE`: a prefill and a decode replica on Ray nodes.

Asks, adds a decode replica and removes it. Then waits, while requests run, for SIGNAL_FILE, by which the caller reports
that it has ended the second node, and until the replica of that node runs on the first one. Then ends the EngineCore of
the other role, and waits until another one serves. Prints JSON as the last line.
"""

import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from tests.cluster.serving_replicas import statuses, wait_for
from tests.serving import Served, serve

PROMPTS = [f"{number} is the beginning of a prompt " + "that goes on and on " * 10 for number in range(3)]
BODY: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
COUNTERS = ("transfers", "transfers_lost", "blocks_sent", "blocks_received", "blocks_rejected")
ANSWER_S = 60.0


class Asking:
    """A client that asks one request after the other."""

    def __init__(self, served: Served):
        self.answers: list[tuple[int, list[int]]] = []  # number of the prompt, tokens
        self.failed: list[str] = []
        self.unanswered = 0
        self._served = served
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        while not self._ended.is_set():
            number = (number + 1) % len(PROMPTS)
            body = {**BODY, "prompt": PROMPTS[number], "cache_salt": str(time.monotonic())}  # no block is cached
            try:
                answer = httpx.post(f"{self._served.url}/v1/completions", json=body, timeout=ANSWER_S)
            except httpx.TimeoutException:
                self.unanswered += 1
                continue
            if answer.status_code == 200:
                self.answers.append((number, answer.json()["choices"][0]["token_ids"]))
            else:
                self.failed.append(answer.text)

    def end(self) -> dict[str, Any]:
        self._ended.set()
        self._thread.join()
        return {"answers": self.answers, "failed": self.failed, "unanswered": self.unanswered}


def ask(served: Served) -> dict[str, Any]:
    """The tokens of all prompts with empty caches, and by how much the counters of transfers have grown."""
    served.post("/reset_prefix_cache")
    before = counters(served)
    tokens = [served.post("/v1/completions", prompt=prompt, **BODY)["choices"][0]["token_ids"] for prompt in PROMPTS]
    deadline = time.monotonic() + ANSWER_S
    while True:
        grown = {name: now - before[name] for name, now in counters(served).items()}
        # Cores report up to four times a second.
        if grown["blocks_sent"] == grown["blocks_received"] > 0 or time.monotonic() > deadline:
            return {"tokens": tokens} | grown
        time.sleep(0.1)


def counters(served: Served) -> dict[str, float]:
    return {name: served.metric(f"redline:kv_{name}_total") for name in COUNTERS}


def replicas(served: Served) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = served.client.get("/health").json()["replicas"]
    return found


def main(model: str, address: str, signal_file: str) -> None:
    flags = (
        "--load-format", "dummy", "--dtype", "float32", "--max-model-len", "1K", "--kv-cache-memory-bytes", "8MiB",
        "--prefill-replicas", "1", "--decode-replicas", "1", "--api-servers", "2",
        "--distributed-executor-backend", "ray", "--ray-address", address,
    )  # fmt: skip
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder), model, *flags) as served:
        found["apart"] = ask(served)
        served.post("/scale", data_parallel_size=3)
        wait_for(served, "ok", "ok", "ok")
        found["roles"] = [one["role"] for one in replicas(served)]
        found["scaled"] = ask(served)
        served.post("/scale", data_parallel_size=2)
        wait_for(served, "ok", "ok")
        asking = Asking(served)
        print("serving", flush=True)
        while not Path(signal_file).exists():
            time.sleep(0.1)
        found["noticed_s"] = wait_for(served, "ok", "restarting")
        [lost] = [number for number, status in enumerate(statuses(served)) if status != "ok"]
        wait_for(served, "ok", "ok")
        found["under_way"] = asking.end()
        found["together"] = ask(served)
        os.kill(replicas(served)[1 - lost]["process"], signal.SIGKILL)
        wait_for(served, "ok", "restarting")
        wait_for(served, "ok", "ok")
        found["again"] = ask(served)
        found |= {"lost": lost, "restarts": served.metric("redline:core_restarts_total"), "output": served.output()}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
