"""A client that reads slowly, over a real socket with small buffers: what it has not taken is merged, not queued."""

import asyncio
import json
import socket
from typing import Any

import pytest

from engine.api.http_server import HttpServer
from engine.api.ports import bind
from engine.api.state import ApiState
from engine.frontend.sampling_params import SamplingParams
from tests.engine.api.conftest import InLoop, in_loop
from tests.engine.fake_executor import expected_tokens

TOKENS = 3000
SMALL = 4096  # bytes the kernel is asked to hold, on either side
HIGH_WATER = 64 << 10  # bytes that uvicorn lets wait in the process


def serve_on(server: InLoop, listener: socket.socket) -> tuple[HttpServer, "asyncio.Future[None]", "asyncio.Event"]:
    side = HttpServer(ApiState(server.client, ("fake",)), listener)
    up = asyncio.Event()
    return side, asyncio.ensure_future(side.serve(lambda _url: up.set())), up


class Reader:
    """A client whose socket holds little."""

    def __init__(self, port: int, body: dict[str, Any]):
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        self._socket.setblocking(False)
        self._port = port
        data = json.dumps(body).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d"
        self._request = head % len(data) + b"\r\n\r\n" + data

    async def ask(self) -> None:
        await self._loop.sock_connect(self._socket, ("127.0.0.1", self._port))
        await self._loop.sock_sendall(self._socket, self._request)

    async def chunks(self) -> list[dict[str, Any]]:
        """All events of the answer, from now on."""
        data = b""
        while b"data: [DONE]" not in data:
            more = await self._loop.sock_recv(self._socket, 1 << 16)
            assert more, "the server hung up"
            data += more
        body = b"".join(data.split(b"\r\n\r\n", 1)[1].split(b"\r\n")[1::2])  # every other line is a length
        return [json.loads(event[6:])["choices"][0] for event in body.split(b"\n\n") if event.startswith(b"data: {")]

    def close(self) -> None:
        self._socket.close()


@pytest.mark.parametrize("pauses", [True, False])
async def test_a_reader_that_pauses_gets_all_text_in_fewer_chunks(pauses: bool):
    async with in_loop(max_model_len=4096, num_blocks=1100) as server:
        listener = bind("127.0.0.1", 0)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        port = listener.getsockname()[1]
        side, serving, up = serve_on(server, listener)
        await up.wait()
        body = {"prompt": [1, 2, 3], "max_tokens": TOKENS, "stream": True, "return_token_ids": True}
        reader = Reader(port, body)
        await reader.ask()
        biggest = 0
        if pauses:
            while server.client.stats.finished["length"] == 0:  # it reads nothing until all is generated
                await asyncio.sleep(0)
                held = [connection.transport.get_write_buffer_size() for connection in connections(side)]
                biggest = max(biggest, *held, 0)
            assert 0 < biggest <= HIGH_WATER + 1024, "what waits to be written is bounded"
        choices = await reader.chunks()
        tokens = [token for choice in choices for token in choice["token_ids"]]
        assert tokens == expected_tokens([1, 2, 3], TOKENS)
        assert "".join(choice["text"] for choice in choices) == bytes(tokens).decode()
        assert [choice["finish_reason"] for choice in choices[-2:]] == [None, "length"]
        if pauses:
            assert len(choices) < TOKENS / 2
            assert max(len(choice["token_ids"]) for choice in choices) > TOKENS / 2, "the rest came as one chunk"
        reader.close()
        side.finish()
        await asyncio.wait_for(serving, 10)


def connections(side: HttpServer) -> list[Any]:
    return list(side._server.server_state.connections)


async def test_an_output_holds_one_delta_however_long_nobody_reads():
    async with in_loop(max_model_len=1024, num_blocks=300) as server:
        stream = server.client.add_request([[1]], SamplingParams(n=2, max_tokens=500))
        while server.client.total_stats.live:
            await asyncio.sleep(0)
            assert len(stream._ready) <= 2
        deltas = await anext(stream)
        assert [(delta.index, len(delta.token_ids), delta.finish_reason) for delta in deltas] == [
            (0, 500, "length"),
            (1, 500, "length"),
        ]
