"""A strict server behind a gateway, in a thread: everything under a base path, and only for who sends the right header.

It refuses fields of requests that it doesn't know, counts no tokens unless asked, and records what came.
"""

import json
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KNOWN = {"model", "prompt", "messages", "max_tokens", "temperature", "stream", "top_k"}


class Gateway:
    """`models` None: no list of models. `extra` are further fields of requests that it knows."""

    def __init__(
        self,
        base: str = "",
        *,
        models: list[str] | None = None,
        header: tuple[str, str] | None = None,
        known: set[str] | frozenset[str] = frozenset(),
        per_chunk: int = 1,
        certificate: tuple[Any, Any] | None = None,
        redirect: str = "",
    ):
        self.base, self.models, self.header, self.redirect = base, models, header, redirect
        self.known, self.per_chunk = KNOWN | set(known), per_chunk
        self.asked: list[tuple[str, str, dict[str, str]]] = []  # method, path, header fields
        self.bodies: list[dict[str, Any]] = []
        self.refused = 0
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.daemon_threads = True
        self._http.gateway = self  # type: ignore[attr-defined]
        if certificate is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(*certificate)
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        scheme = "https" if certificate else "http"
        self.root = f"{scheme}://localhost:{self._http.server_address[1]}"
        self.url = self.root + base
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> "Gateway":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def paths(self) -> set[str]:
        return {path for _, path, _ in self.asked}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        gateway, path = self._received(), self.path.partition("?")[0]
        if gateway.redirect and path.startswith(gateway.redirect):
            self._answer(308, b"", Location=gateway.url + path.removeprefix(gateway.redirect))
        elif not self._allowed(gateway):
            self._answer(403, b'{"error": {"message": "who are you?"}}')
        elif path == f"{gateway.base}/v1/models" and gateway.models is not None:
            self._answer(200, json.dumps({"data": [{"id": name} for name in gateway.models]}).encode())
        elif path == f"{gateway.base}/metrics":
            self._answer(307, b"", Location=f"{gateway.base}/metrics/")  # as a mounted application does
        elif path == f"{gateway.base}/metrics/":
            self._answer(
                200, b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\nvllm:num_preemptions_total 0\n"
            )
        else:
            self._answer(404, b'{"detail": "Not Found"}')

    def do_POST(self) -> None:
        gateway = self._received()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        gateway.bodies.append(body)
        unknown = set(body) - gateway.known
        if not self._allowed(gateway) or self.path.partition("?")[0] != f"{gateway.base}/v1/completions" or unknown:
            gateway.refused += 1
            self._answer(400, json.dumps({"error": {"message": f"not known: {sorted(unknown)}"}}).encode())
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        total = body["max_tokens"]
        for start in range(0, total, gateway.per_chunk):
            end = min(start + gateway.per_chunk, total)
            self._event(
                {"index": 0, "text": "ab " * (end - start), "finish_reason": "length" if end == total else None}
            )
        self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    def _received(self) -> Gateway:
        self.server.gateway.asked.append((self.command, self.path, dict(self.headers.items())))
        return self.server.gateway

    def _allowed(self, gateway: Gateway) -> bool:
        return gateway.header is None or self.headers.get(gateway.header[0]) == gateway.header[1]

    def _event(self, choice: dict[str, Any]) -> None:
        event = b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))

    def _answer(self, status: int, content: bytes, **fields: str) -> None:
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Stay quiet."""
