"""`redline serve` with several ranks: the tokens of one over HTTP, and a killed one ends the server with its cause."""

import json
import os
import signal
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.engine.worker.driver import BASE, Driver, Request
from tests.engine.worker.test_multiprocess import start
from tests.serving import serve

WITHIN_S = 5.0  # from the death of a rank to the server's end
FLAGS = ["--dtype", "float32", "--kv-cache-memory-bytes", "4MiB", "--max-num-batched-tokens", "16"]
PROMPT = [i % 90 + 2 for i in range(50)]
NEW = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps({**BASE, "model_type": "llama"}))
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[int]:
    """The tokens of one rank."""
    driver: Driver = start(folder, 1, load_format="dummy")
    try:
        request = Request(PROMPT)
        driver.run([request], NEW, seed=0, preempt=0.0)
        return request.output
    finally:
        driver.executor.shutdown()


@pytest.mark.parametrize(
    ("flags", "victim"),
    [
        (("--tp", "2"), 1),
        (("--tp", "2", "--engine", "v0", "--enable-chunked-prefill"), 1),
        (("--tp", "2", "--ablate", "driver-broadcast"), 0),
        (("--pp", "2"), 1),
    ],
    ids=["V1", "V0", "rank 0 drives", "pipeline stages"],
)
def test_two_ranks_serve_and_one_killed_ends_the_server(
    flags: tuple[str, ...], victim: int, folder: Path, expected: list[int], tmp_path: Path
) -> None:
    with serve(tmp_path, str(folder), "--load-format", "dummy", *FLAGS, *flags) as server:
        assert ("driver-broadcast" in server.output()) == (len(flags) > 2)
        body = {"model": str(folder), "prompt": PROMPT, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        answer = server.post("/v1/completions", **body, return_token_ids=True)
        assert answer["choices"][0]["token_ids"] == expected
        core = psutil.Process(server.process.pid).children()[0]
        ranks = sorted(core.children(), key=lambda child: child.pid)
        assert len(ranks) == 2
        cause = f"rank {victim} (process {ranks[victim].pid}) was killed by SIGKILL"
        body = {**body, "max_tokens": 200, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as streamed:
            lines = (line for line in streamed.iter_lines() if line)
            next(lines)
            os.kill(ranks[victim].pid, signal.SIGKILL)
            killed = time.monotonic()
            *_, error = lines
        assert json.loads(error.removeprefix("data: "))["error"]["message"].startswith(cause)
        assert server.process.wait(WITHIN_S) == 1
        took = time.monotonic() - killed
        print(f"the server ended {took:.2f} s after its rank")
        assert took < WITHIN_S
        assert server.output().splitlines()[-1].startswith(f"redline: error: {cause}")
        _, alive = psutil.wait_procs([core, *ranks], WITHIN_S)
        assert not alive
