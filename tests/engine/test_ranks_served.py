"""`redline serve --tp 2`: the tokens of one rank over HTTP, and a killed rank ends the server with its cause."""

import json
import os
import signal
import time
from pathlib import Path

import psutil

from tests.engine.worker.driver import BASE, Driver, Request
from tests.engine.worker.test_multiprocess import start
from tests.serving import serve

WITHIN_S = 20.0  # of a loaded machine; no more than a moment otherwise
FLAGS = ["--dtype", "float32", "--kv-cache-memory-bytes", "4MiB", "--max-num-batched-tokens", "16"]
PROMPT = [i % 90 + 2 for i in range(50)]


def expected(folder: Path, new: int) -> list[int]:
    driver: Driver = start(folder, 1, load_format="dummy")
    try:
        request = Request(PROMPT)
        driver.run([request], new, seed=0, preempt=0.0)
        return request.output
    finally:
        driver.executor.shutdown()


def test_two_ranks_serve_and_one_killed_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "model_type": "llama"}))
    with serve(tmp_path, str(tmp_path), "--tp", "2", "--load-format", "dummy", *FLAGS) as server:
        body = {"model": str(tmp_path), "prompt": PROMPT, "max_tokens": 30, "temperature": 0, "ignore_eos": True}
        answer = server.post("/v1/completions", **body, return_token_ids=True)
        assert answer["choices"][0]["token_ids"] == expected(tmp_path, 30)
        core = psutil.Process(server.process.pid).children()[0]
        ranks = sorted(core.children(), key=lambda child: child.pid)
        assert len(ranks) == 2
        os.kill(ranks[1].pid, signal.SIGKILL)
        assert server.process.wait(WITHIN_S) == 1
        last = server.output().splitlines()[-1]
        assert last.startswith(f"redline: error: rank 1 (process {ranks[1].pid}) was killed by SIGKILL")
        deadline = time.monotonic() + WITHIN_S
        while any(child.is_running() for child in (core, *ranks)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(child.is_running() for child in (core, *ranks))
