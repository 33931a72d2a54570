"""known_server.py as a process of its own, with what it logged."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.loadgen import Observer, Recording, run_load
from bench.target import Target
from bench.workloads import RequestSpec

SERVER = Path(__file__).with_name("known_server.py")


class Quiet:
    """An observer that lets a load point run to its end."""

    def tick(self, now_s: float, sent: int, first_token: int, finished: int, failed: int) -> bool:
        return True


class KnownServer:
    """A running known_server.py and the load generator pointed at it."""

    def __init__(self, folder: Path, certificate: tuple[Path, Path] | None = None):
        self.log = folder / "sent.jsonl"
        extra = [str(path) for path in certificate or ()]
        command = [sys.executable, str(SERVER), str(self.log), *extra]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        port = int(self.process.stdout.readline())
        self.url = f"https://localhost:{port}" if certificate else f"http://127.0.0.1:{port}"

    def run(
        self,
        tokens: list[int],
        times: list[float] | None = None,
        *,
        watcher: Observer | None = None,
        time_limit_s: float = 60,
        chat: bool = False,
        **plan: Any,
    ) -> Recording:
        """Requests that ask for `tokens[i]` tokens each, at once unless `times` says otherwise."""
        target = Target(self.url, json.dumps(plan), api_key="key")
        specs = [
            RequestSpec(1, count, messages=[{"role": "user", "content": "hi"}])
            if chat
            else RequestSpec(5, count, prompt_ids=[7, 8, 9, 10, 11])
            for count in tokens
        ]
        moments = np.zeros(len(tokens)) if times is None else np.array(times)
        return run_load(target, specs, moments, observer=watcher or Quiet(), time_limit_s=time_limit_s)

    def sent(self, count: int) -> dict[int, dict[str, Any]]:
        """The log of the server by max_tokens, once it holds `count` requests."""
        for _ in range(200):
            lines = self.log.read_text().splitlines() if self.log.exists() else []
            if len(lines) >= count:
                return {entry["max_tokens"]: entry for entry in map(json.loads, lines)}
            time.sleep(0.05)
        raise AssertionError(f"the server logged {len(lines)} requests instead of {count}")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
