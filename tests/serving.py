"""Starts real `redline serve` processes for tests, and ends them."""

import os
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

START_S = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Served:
    url: str
    process: subprocess.Popen[bytes]
    log: Path
    client: httpx.Client

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        result: dict[str, Any] = answer.json()
        return result

    def metric(self, name: str) -> float:
        """The sum over all labels of a Prometheus sample."""
        text = self.client.get("/metrics").text
        values = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert values, f"no metric {name} in:\n{text}"
        return sum(map(float, values))

    def output(self) -> str:
        return self.log.read_text(errors="replace")


@contextmanager
def serve(
    folder: Path, model: str, *flags: str, env: dict[str, str] | None = None, certificate: Path | None = None
) -> Iterator[Served]:
    """A server on a free port, ready to answer; ended by Ctrl-C, and by force if that takes too long.

    `env` is added to the environment; `certificate` is the one of a server that speaks HTTPS.
    """
    port = free_port()
    log = folder / f"serve-{port}.log"
    command = [sys.executable, "-m", "cli.main", "serve", model, "--port", str(port), *flags]
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})})
    url = f"{'http' if certificate is None else 'https'}://127.0.0.1:{port}"
    trusted = True if certificate is None else ssl.create_default_context(cafile=certificate)
    client = httpx.Client(base_url=url, timeout=httpx.Timeout(120.0), verify=trusted)
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                if client.get("/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert process.poll() is None, f"the server ended:\n{log.read_text(errors='replace')}"
            assert time.monotonic() < deadline, f"the server isn't up:\n{log.read_text(errors='replace')}"
            time.sleep(0.1)
        yield Served(url, process, log, client)
    finally:
        client.close()
        if process.poll() is None:
            process.send_signal(2)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
