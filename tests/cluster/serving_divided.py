"""`python -m tests.cluster.serving_divided FOLDER HOST:PORT KILLED`: two replicas of two ranks on Ray nodes.

Asks both, and for one more than there are CPUs. Then waits for the file KILLED, by which the caller reports that it has
killed a rank of the second node, and until its replica serves again. Prints JSON as the last line.
"""

import json
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.cluster.serving_replicas import WAIT_S, refused_scale, wait_for
from tests.engine.worker.driver import BASE
from tests.serving import Served, serve

PROMPTS = [[(5 * i + 11 * number) % 110 + 1 for i in range(40 + number)] for number in range(8)]
NEW = 12


def write_model(folder: Path) -> str:
    """A model that two ranks can divide."""
    (folder / "config.json").write_text(json.dumps({**BASE, "model_type": "llama"}))
    return str(folder)


def ask(served: Served) -> list[list[int]]:
    """All at once, so that all replicas get some."""

    def one(prompt: list[int]) -> list[int]:
        body = {"max_tokens": NEW, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        tokens: list[int] = served.post("/v1/completions", prompt=prompt, **body)["choices"][0]["token_ids"]
        return tokens

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(one, PROMPTS))


def wait_for_file(path: str) -> None:
    while not Path(path).exists():
        time.sleep(0.1)


def error_of_replica(served: Served) -> str:
    """The error of a replica that does not serve, once there is one."""
    begin = time.monotonic()
    while True:
        replicas: list[dict[str, Any]] = served.client.get("/health").json()["replicas"]
        errors = [str(one.get("cause", "")) for one in replicas if one["status"] != "ok"]
        if found := [error for error in errors if error]:
            return found[0]
        assert time.monotonic() - begin < WAIT_S, f"{replicas}:\n{served.output()}"
        time.sleep(0.05)


def main(model: str, address: str, killed: str) -> None:
    flags = (
        "--load-format", "dummy", "--dtype", "float32", "--kv-cache-memory-bytes", "8MiB", "--tp", "2", "--dp", "2",
        "--kv-spill", "host=4MiB",
        "--distributed-executor-backend", "ray", "--ray-address", address,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder), model, *flags) as served:
        tokens, refused = [ask(served)], refused_scale(served, 3)
        print("serving", flush=True)
        wait_for_file(killed)
        cause = error_of_replica(served)
        tokens.append(ask(served))
        wait_for(served, "ok", "ok")
        tokens.append(ask(served))
        text = served.client.get("/metrics").text
        used = [
            float(value)
            for value in re.findall(r"^redline:replica_generation_tokens_total\{.*\} (\S+)$", text, re.MULTILINE)
        ]
        output = served.output()
    found = {
        "tokens": tokens, "used": list(map(float, used)), "refused": refused, "killed": cause, "output": output,
    }  # fmt: skip
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
