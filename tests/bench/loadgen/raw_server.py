"""A server that answers each request with exactly the bytes given, on one connection as long as the client keeps it."""

import json
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

Piece = bytes | float  # what is sent, or seconds of waiting


class RawServer:
    """`answers[i]` is sent to the i-th request, the last one to all that follow; `closes` ends the connection then."""

    def __init__(self, *answers: Sequence[Piece], closes: bool = False):
        self._answers = answers
        self._closes = closes
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self.requests: list[bytes] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "RawServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def body(self, number: int = -1) -> dict[str, Any]:
        return json.loads(self.requests[number].partition(b"\r\n\r\n")[2])

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with sock:
            while True:
                try:
                    if not self._answer(sock):
                        return
                except OSError:
                    return

    def _answer(self, sock: socket.socket) -> bool:
        data = b""
        while (end := data.find(b"\r\n\r\n")) < 0 or len(data) < end + 4 + _length(data[:end]):
            piece = sock.recv(65536)
            if not piece:
                return False
            data += piece
        with self._lock:
            answer = self._answers[min(len(self.requests), len(self._answers) - 1)]
            self.requests.append(data)
        for piece in answer:
            if isinstance(piece, float):
                time.sleep(piece)
            else:
                sock.sendall(piece)
        return not self._closes


def _length(head: bytes) -> int:
    fields = [line.partition(b":") for line in head.lower().split(b"\r\n")]
    return next((int(value) for name, _, value in fields if name == b"content-length"), 0)
