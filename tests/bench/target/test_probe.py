"""What a server says about itself."""

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from bench.errors import BenchError
from bench.target import Target
from bench.target.probe import ServerInfo, probe_server
from tests.bench.gateway import Gateway


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
        ({"owned_by": "redline", "max_model_len": 8192, "vocab_size": 49152}, ServerInfo("m", 8192, 49152, "redline")),
        ({"owned_by": "vllm", "max_model_len": 4096}, ServerInfo("m", 4096, None, "vllm")),
        ({"owned_by": "sglang", "max_model_len": None}, ServerInfo("m", None, None, "sglang")),
        ({"owned_by": "somebody", "max_model_len": "8k"}, ServerInfo("m", None, None, "unknown")),
    ],
)
def test_facts(models: Any, fields: dict[str, Any], facts: ServerInfo) -> None:
    models.content = card(**fields)
    assert probe_server(Target(models.url + "/v1/", api_key="secret")) == facts
    assert models.asked == [("/v1/models", "Bearer secret")]


@pytest.mark.parametrize(
    ("status", "content", "words"),
    [
        (401, b"", "--api-key"),
        (403, b"", "--api-key"),
        (404, b"", "HTTP 404.*--url.*--served-model"),
        (200, b"hello", "--url"),
        (200, b'{"data": []}', "--url"),
        (502, b"", "HTTP 502.*--url"),
        (200, b'{"data": [7, {"x": 1}]}', "lists no model"),
    ],
)
def test_answers_that_do_not_help(models: Any, status: int, content: bytes, words: str) -> None:
    models.status, models.content = status, content
    with pytest.raises(BenchError, match=words):
        probe_server(models.url)


def test_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(BenchError, match=rf"cannot reach a server at http://127\.0\.0\.1:{port}.*--url"):
        probe_server(f"http://127.0.0.1:{port}")


def test_a_server_that_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(BenchError, match=r"did not answer.*--url"):
        probe_server(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.1)


@pytest.mark.parametrize("status", [400, 403, 404, 405, 501])
def test_a_server_without_a_list_serves_the_model_that_is_named(models: Any, status: int) -> None:
    models.status = status
    facts = probe_server(Target(models.url, "m"))
    assert (facts, len(facts.notes)) == (ServerInfo("m", None, None, "unknown"), 1)
    assert f"HTTP {status}" in facts.notes[0]
    models.status, models.content = 200, b"<html>"
    assert probe_server(Target(models.url, "m")).model == "m"


@pytest.mark.parametrize("status", [401, 500, 503])
def test_a_named_model_excuses_no_other_failure(models: Any, status: int) -> None:
    models.status = status
    with pytest.raises(BenchError, match=str(status)):
        probe_server(Target(models.url, "m"))


def test_a_server_that_is_starting_says_so(models: Any) -> None:
    models.status = 503
    with pytest.raises(BenchError, match=r"HTTP 503: the server is not ready\. Repeat"):
        probe_server(models.url)


def test_of_several_models_the_one_named_is_asked_for(models: Any) -> None:
    cards = [{"id": name, "max_model_len": size} for name, size in (("base", 100), ("lora/a", 200))]
    models.content = json.dumps({"data": cards}).encode()
    assert probe_server(Target(models.url, "lora/a")) == ServerInfo("lora/a", 200, None, "unknown")
    facts = probe_server(models.url)
    assert facts.model == "base"
    assert facts.notes == ("the server lists base, lora/a: using base (--served-model selects another)",)
    with pytest.raises(
        BenchError, match=r"no model 'lora/b' \(did you mean 'lora/a'\?\); it lists base, lora/a \(--served-mod"
    ):
        probe_server(Target(models.url, "lora/b"))
    assert models.asked[-1][0] == "/v1/models/lora/b"  # it could be servable without being listed


def test_redirects_are_followed_on_the_server_and_named_beyond_it() -> None:
    with Gateway("/new", models=["m"], redirect="/old") as gateway:
        facts = probe_server(Target(gateway.root + "/old/v1", api_key="k"))
        assert facts.target is not None
        assert facts.target.base_url == gateway.url
        assert facts.notes == (f"{gateway.root}/old redirects to {gateway.url}, which is measured",)
        gateway.url = "http://elsewhere.invalid/new"
        with pytest.raises(BenchError, match=r"redirects to http://elsewhere.invalid/new: use that address \(--url\)"):
            probe_server(gateway.root + "/old")
        gateway.url = gateway.root + "/login?"
        with pytest.raises(BenchError, match="which is not a model list"):
            probe_server(gateway.root + "/old")
