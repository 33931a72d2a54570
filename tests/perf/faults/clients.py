"""Clients of a server that something is done to: streams on threads, and what each of them saw."""

import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any

import httpx

from tests.serving import Served

BODY: dict[str, Any] = {"prompt": "a prompt of some words", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
TIMEOUT_S = 60.0


def ask(served: Served, **more: Any) -> str:
    """Send one completion on a connection of its own; what the client saw: a status, with the error's message."""
    try:
        # verify=False: reading the system's certificates takes longer than the request.
        answer = httpx.post(f"{served.url}/v1/completions", json={**BODY, **more}, timeout=TIMEOUT_S, verify=False)
    except httpx.TransportError as error:
        return type(error).__name__
    return "200" if answer.status_code == 200 else f"{answer.status_code}: {message_of(answer.json())}"


def message_of(body: dict[str, Any]) -> str:
    return str(body["error"]["message"])


def most_seen(seen: Iterable[str]) -> str:
    """What clients saw, the most frequent first."""
    return "; ".join(f"{count} × {what}" for what, count in Counter(seen).most_common())


class Streams:
    """Streamed completions, each on a thread; `seen` is how each one ended."""

    def __init__(self, served: Served, count: int, **more: Any):
        self.seen: list[str] = []
        self._body = {**BODY, "max_tokens": 1500, "stream": True, **more}
        self._begun = threading.Semaphore(0)
        self._threads = [threading.Thread(target=self._read, args=(served,), daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            assert self._begun.acquire(timeout=TIMEOUT_S), "a stream didn't begin"

    def wait(self) -> list[str]:
        """Wait until all have ended; what they saw."""
        for thread in self._threads:
            thread.join(TIMEOUT_S)
        return self.seen

    def _read(self, served: Served) -> None:
        begun = False
        try:
            url = f"{served.url}/v1/completions"
            with httpx.stream("POST", url, json=self._body, timeout=TIMEOUT_S, verify=False) as answer:
                last = ""
                for line in answer.iter_lines():
                    if line.startswith("data: ") and not last.startswith('{"error"'):
                        last = line.removeprefix("data: ")
                        if not begun:
                            begun = True
                            self._begun.release()
            self.seen.append(f"error event: {message_of(json.loads(last))}" if last.startswith('{"error"') else last)
        except httpx.TransportError as error:
            self.seen.append(type(error).__name__)
        if not begun:
            self._begun.release()


def request_bytes(**more: Any) -> bytes:
    body = json.dumps({**BODY, **more}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def connect(served: Served) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=TIMEOUT_S)


def slow_reader(served: Served) -> socket.socket:
    """A client that asks for a long stream and reads nothing of it."""
    client = connect(served)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.sendall(request_bytes(max_tokens=3000, stream=True, logprobs=5))
    return client


def disconnect_abruptly(served: Served, after: int, stream: bool) -> None:
    """Ask, read so many bytes, and reset the connection."""
    client = connect(served)
    client.sendall(request_bytes(max_tokens=400, stream=stream, n=2, temperature=1.0))
    if after and stream:
        client.recv(after)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
