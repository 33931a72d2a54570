"""What a server says about itself."""

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from bench.errors import BenchError
from bench.loadgen.probe import ServerFacts, probe_server


class Models(BaseHTTPRequestHandler):
    """Answers /v1/models with what the server object holds."""

    server: Any

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *_: Any) -> None:
        """Stay quiet."""


@pytest.fixture
def models() -> Iterator[Any]:
    server: Any = HTTPServer(("127.0.0.1", 0), Models)
    server.status, server.content, server.asked = 200, b"", []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def card(**fields: Any) -> bytes:
    return json.dumps({"object": "list", "data": [{"id": "m", "object": "model", **fields}]}).encode()


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"owned_by": "redline", "max_model_len": 8192, "vocab_size": 49152}, ServerFacts("m", 8192, 49152, "redline")),
        ({"owned_by": "vllm", "max_model_len": 4096}, ServerFacts("m", 4096, None, "vllm")),
        ({"owned_by": "sglang", "max_model_len": None}, ServerFacts("m", None, None, "sglang")),
        ({"owned_by": "somebody", "max_model_len": "8k"}, ServerFacts("m", None, None, "unknown")),
    ],
)
def test_facts(models: Any, fields: dict[str, Any], facts: ServerFacts) -> None:
    models.content = card(**fields)
    assert probe_server(models.url + "/v1/", "secret") == facts
    assert models.asked == [("/v1/models", "Bearer secret")]


@pytest.mark.parametrize(
    ("status", "content", "words"),
    [(401, b"", "--api-key"), (404, b"", "HTTP 404.*--url"), (200, b"hello", "--url"), (200, b'{"data": []}', "--url")],
)
def test_answers_that_do_not_help(models: Any, status: int, content: bytes, words: str) -> None:
    models.status, models.content = status, content
    with pytest.raises(BenchError, match=words):
        probe_server(models.url)


def test_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(BenchError, match=rf"no server can be reached at http://127\.0\.0\.1:{port}.*--url"):
        probe_server(f"http://127.0.0.1:{port}")


def test_a_server_that_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(BenchError, match=r"does not answer.*--url"):
        probe_server(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.1)
