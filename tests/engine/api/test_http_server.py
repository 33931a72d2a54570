"""The HTTP side over a real socket: what it does with clients that send too much."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest

from engine.api import http_server as module
from engine.api.http_options import HttpOptions, Limits
from engine.api.http_server import HttpServer
from engine.api.ports import bind
from engine.api.state import ApiState
from tests.engine.api.conftest import in_loop

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    async with in_loop() as inner:
        listener = bind("127.0.0.1", 0)
        port = listener.getsockname()[1]
        options = HttpOptions(limits=Limits(max_body_bytes=1 << 20))
        side = HttpServer(ApiState(inner.client, ("fake",), options), listener)
        up = asyncio.Event()
        serving = asyncio.ensure_future(side.serve(lambda _url: up.set()))
        await up.wait()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            yield reader, writer
        finally:
            writer.close()
            side.end(0)
            await serving


async def status(reader: asyncio.StreamReader) -> int:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    await reader.readexactly(int(length.split(b":")[1]))
    return int(head.split()[1])


async def test_a_client_that_sends_all_before_it_reads_gets_its_answer():
    async with connected() as (reader, writer):
        writer.write(HEAD % (32 << 20))
        for _ in range(32):
            writer.write(b" " * (1 << 20))
            await writer.drain()
        assert await status(reader) == 413
        writer.write(HEALTH)  # and may go on with the same connection
        assert await status(reader) == 200


async def test_the_rest_of_a_refused_body_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LINGER_S", 0.2)
    async with connected() as (reader, writer):
        writer.write(HEAD % (32 << 20))
        assert await status(reader) == 413
        assert await asyncio.wait_for(reader.read(), 20) == b"", "closed by the server"


@pytest.mark.parametrize("endless", [b"x-a: " + b"a" * 8192, b"x-a: b\r\n" * 1000])
async def test_a_head_without_an_end_is_refused(endless: bytes):
    async with connected() as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\n")
        for _ in range(module.MAX_HEAD_BYTES // len(endless) + 1):  # no more: what isn't read resets the connection
            writer.write(endless)
            await writer.drain()
        answer = await asyncio.wait_for(reader.read(), 20)
        assert answer.startswith(b"HTTP/1.1 431 ")
        assert b"65,536" in answer


async def test_a_long_body_in_one_piece_with_its_head_is_no_long_head():
    async with connected() as (reader, writer):
        body = json.dumps({"prompt": "ab", "max_tokens": 1, "user": "x" * 200_000}).encode()
        for _ in range(2):
            writer.write(HEAD % len(body) + body)
            assert await status(reader) == 200
