"""`make bench-limits`: what a body that is far too long costs a server, and those who ask something meanwhile.

Prompts of some megabytes, chats, token ids and nested lists are sent to a server of a tiny model with a trained
tokenizer, while another client asks for /health all the time. Rows go to results/bench-limits.json: case, megabytes,
status, seconds from the last byte (or the answer, if sooner) to the answer, the longest answer of /health, memory that
the API process had at most and kept. MODEL=smollm2-135m names the model; its weights are random.
"""

import http.client
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from tests.serving import Served, serve

RESULTS = Path("results") / "bench-limits.json"
WORDS = "the quick brown fox jumps over the lazy dog and goes on to the next page of the book. "
SIZES = (1, 8, 24, 128)  # megabytes; the default --max-body-bytes is 32 MiB


def text(size: int) -> str:
    return (WORDS * (size // len(WORDS) + 1))[:size]


CASES: dict[str, tuple[str, Callable[[int], Any]]] = {
    "completion": ("/v1/completions", lambda size: {"prompt": text(size), "max_tokens": 1}),
    "one word": ("/v1/completions", lambda size: {"prompt": "a" * size, "max_tokens": 1}),
    "chat": (
        "/v1/chat/completions",
        lambda size: {"messages": [{"role": "user", "content": text(size)}], "max_tokens": 1},
    ),
    "token ids": ("/v1/completions", lambda size: {"prompt": [7] * (size // 2), "max_tokens": 1}),
    "empty lists": ("/v1/completions", lambda size: {"prompt": [[]] * (size // 3), "max_tokens": 1}),
    "tokenize": ("/tokenize", lambda size: {"prompt": text(size)}),
}


class Beside:
    """Asks for /health without a pause, and watches the memory of the API process."""

    def __init__(self, served: Served):
        self._host, port = served.url.removeprefix("http://").split(":")
        self._port = int(port)
        self._process = psutil.Process(served.process.pid)
        self._over = threading.Event()
        self.longest = 0.0
        self.before = self.most = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> "Beside":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def kept(self) -> int:
        return self._process.memory_info().rss - self.before

    def _ask(self) -> None:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=300)
        while not self._over.is_set():
            begin = time.monotonic()
            connection.request("GET", "/health")
            connection.getresponse().read()
            self.longest = max(self.longest, time.monotonic() - begin)
            self.most = max(self.most, self._process.memory_info().rss)
            time.sleep(0.002)
        connection.close()


def measure(served: Served, case: str, megabytes: int) -> dict[str, Any]:
    path, body_of = CASES[case]
    body = json.dumps(body_of(megabytes * 1_000_000), separators=(",", ":")).encode()
    host, port = served.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=300)
    with Beside(served) as beside:
        time.sleep(0.2)
        connection.putrequest("POST", path)
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders()
        begin = time.monotonic()
        try:
            connection.send(body)
            begin = time.monotonic()
        except OSError:
            pass  # refused before all of it was sent: the answer is there already
        answer = connection.getresponse()
        said = answer.read()
        seconds = time.monotonic() - begin
        connection.close()
        time.sleep(1.0)
    return {
        "case": case, "megabytes": megabytes, "status": answer.status, "seconds": round(seconds, 3),
        "health_ms": round(1000 * beside.longest, 1), "peak_mb": round((beside.most - beside.before) / 1e6, 1),
        "kept_mb": round(beside.kept / 1e6, 1), "message": json.loads(said).get("error", {}).get("message", "")[:120],
    }  # fmt: skip


def main() -> int:
    model = os.environ.get("MODEL", "smollm2-135m")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        flags = ("--load-format", "dummy", "--max-model-len", "2K", "--disable-log-requests")
        with serve(Path(name), model, *flags) as served:
            measure(served, "completion", 1)  # what is made on first use
            for case in CASES:
                rows += [measure(served, case, megabytes) for megabytes in SIZES]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    table = Table("case", "MB", "status", "answer after, s", "/health at most, ms", "peak, MB", "kept, MB", "message")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=180).print(table)
    return 0 if all(400 <= row["status"] < 500 for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
