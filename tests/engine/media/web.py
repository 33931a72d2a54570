"""A small web server on real sockets, whose answers tests write byte by byte."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable

Handler = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Web:
    """A running server: `answers` by path; `paths` lists what was asked for, `hosts` the Host headers."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes | Handler] = {}
        self.paths: list[str] = []
        self.hosts: list[str] = []
        self.connections = 0
        self.port = 0
        self.left = asyncio.Event()  # a client closed its connection during an answer

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            path = head.split(" ", 2)[1]
            self.paths.append(path)
            self.hosts += [line[6:] for line in head.split("\r\n") if line.lower().startswith("host: ")]
            answer = self.answers.get(path, reply(b"", "404 Not Found"))
            if isinstance(answer, bytes):
                writer.write(answer)
            else:
                gone = asyncio.ensure_future(reader.read())
                answering = asyncio.ensure_future(answer(writer))
                try:
                    await asyncio.wait({gone, answering}, return_when=asyncio.FIRST_COMPLETED)
                    if gone.done():
                        self.left.set()
                finally:
                    gone.cancel()
                    answering.cancel()
                    await asyncio.gather(gone, answering, return_exceptions=True)
        writer.close()


def reply(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    fields = {"Content-Length": str(len(body)), "Connection": "close"}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode() + body


def redirect(to: str) -> bytes:
    return reply(b"", "302 Found", Location=to)


async def endless(writer: asyncio.StreamWriter) -> None:
    """An answer without an end."""
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    while not writer.is_closing():
        writer.write(bytes(1 << 16))
        await writer.drain()


async def silent(_writer: asyncio.StreamWriter) -> None:
    """No answer, until the client has left."""
    await asyncio.sleep(600)


@contextlib.asynccontextmanager
async def web(address: str = "127.0.0.1", tls: ssl.SSLContext | None = None, port: int = 0) -> AsyncIterator[Web]:
    running = Web()
    server = await asyncio.start_server(running.serve, address, port, ssl=tls)
    running.port = server.sockets[0].getsockname()[1]
    try:
        yield running
    finally:
        server.close()
