"""Kept responses of all API processes of a server: each process keeps its own, and asks the others on a Unix socket.

The id of a response has the number of its process.
"""

import asyncio
import contextlib
import os

import msgspec

from engine.api.error_responses import ApiError
from engine.api.http_options import Limits
from engine.api.response_store import ResponseStore, StoredResponse, Turn, missing, process_of
from engine.children import frame

PATIENCE_S = 10.0  # for another process to answer
LONGEST_CALL = 1 << 16  # bytes


class PeerCall(msgspec.Struct, array_like=True):
    """What a process asks another one: for a response of an owner, or to forget it."""

    name: str
    owner: int | None
    forget: bool


class PeerResponse(msgspec.Struct, array_like=True):
    """See `StoredResponse`."""

    body: bytes
    turns: tuple[bytes, ...]


_call_decoder = msgspec.msgpack.Decoder(PeerCall)
_response_decoder = msgspec.msgpack.Decoder(PeerResponse | None)


class SharedResponses:
    """The responses that a server keeps, as one of its API processes sees them."""

    def __init__(self, limits: Limits, process: int = 0, folder: str = ""):
        """`process` is the number of this API process, `folder` has the sockets of all; "": there is one process."""
        self.own = ResponseStore(limits, process)
        self._process = process
        self._folder = folder
        self._server: asyncio.AbstractServer | None = None
        self.new_id = self.own.new_id
        self.put = self.own.put

    async def open(self) -> None:
        """Answer the other processes."""
        if self._folder:
            self._server = await asyncio.start_unix_server(self._answer, self._address(self._process))

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def get(self, name: str, owner: int | None, param: str | None = None) -> StoredResponse:
        """A response of this owner; `param` is the field that names it.

        Raises ApiError 404 if it is not stored, 503 if its process does not answer.
        """
        if self._is_own(name):
            return self.own.get(name, owner, param)
        found = await self._ask(PeerCall(name, owner, False), param)
        return StoredResponse(found.body, tuple(map(Turn.of_data, found.turns)), owner)

    async def delete(self, name: str, owner: int | None) -> None:
        """Forget a response of this owner. Raises ApiError as `get` does."""
        if self._is_own(name):
            self.own.delete(name, owner)
        else:
            await self._ask(PeerCall(name, owner, True), None)

    def _is_own(self, name: str) -> bool:
        return not self._folder or process_of(name) in (None, self._process)

    def _address(self, process: int | None) -> str:
        return os.path.join(self._folder, f"responses-{process}")

    async def _ask(self, call: PeerCall, param: str | None) -> PeerResponse:
        process = process_of(call.name)
        try:
            async with asyncio.timeout(PATIENCE_S):
                reader, writer = await asyncio.open_unix_connection(self._address(process))
                with contextlib.closing(writer):
                    writer.write(frame(msgspec.msgpack.encode(call)))
                    answer = _response_decoder.decode(await _read(reader))
        except (OSError, asyncio.IncompleteReadError) as error:  # TimeoutError is an OSError
            message = f"the response {call.name!r} belongs to API process {process}, which does not answer"
            raise ApiError(503, message, param=param, code="process_lost") from error
        if answer is None:
            raise missing(call.name, param)
        return answer

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one call of another process."""
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.IncompleteReadError):  # it has ended
            call = _call_decoder.decode(await _read(reader, LONGEST_CALL))
            answer: PeerResponse | None = None
            with contextlib.suppress(ApiError):
                found = self.own.get(call.name, call.owner)
                answer = PeerResponse(found.body, tuple(turn.data for turn in found.turns))
                if call.forget:
                    self.own.delete(call.name, call.owner)
            writer.write(frame(msgspec.msgpack.encode(answer)))
            await writer.drain()


async def _read(reader: asyncio.StreamReader, most: int = 1 << 62) -> bytes:
    """The next frame (see `engine.children.frame`). Raises IncompleteReadError if it is longer than `most`."""
    size = int.from_bytes(await reader.readexactly(8), "little")
    if size > most:
        raise asyncio.IncompleteReadError(b"", size)
    return await reader.readexactly(size)
