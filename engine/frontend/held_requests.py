"""Requests that no replica can take while one is being started: they wait here, in the order of their arrival."""

import asyncio
from collections.abc import Callable

from engine.errors import EngineDeadError, RedlineError, cause_of
from engine.frontend.front_end_stats import FrontEndStats
from engine.frontend.streams import RequestStream


class HeldRequests:
    """The client of streams that wait for a replica; lives in the event loop of its router."""

    def __init__(self, stats: FrontEndStats) -> None:
        """`stats` are those of the front end in which the requests that wait are counted."""
        self.touched: list[RequestStream] = []  # always empty: these streams have no output
        self._stats = stats
        self._streams: dict[int, RequestStream] = {}  # by id
        self._waiters: list[asyncio.Future[None]] = []

    def add(self, stream: RequestStream) -> None:
        """Hold a stream, none of whose outputs is with a core."""
        stream.client, stream.held = self, True
        self._streams[id(stream)] = stream
        self._stats.held += _outputs(stream)

    def abort(self, stream: RequestStream) -> None:
        """Its reader has left."""
        self._remove(stream)
        stream.release_inputs()
        stream.wake()

    async def wait(self) -> None:
        """Wait until a replica serves, or until none is going to, with a request that is no stream yet."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._stats.held += 1
        try:
            await waiter
        finally:
            self._stats.held -= 1

    def submit_all(self, submit: Callable[[RequestStream], None]) -> None:
        """A replica serves: submit all; a stream that can't be submitted fails."""
        self._wake()
        for stream in list(self._streams.values()):
            self._remove(stream)
            try:
                submit(stream)
            except Exception as error:  # only this stream fails
                stream.release_inputs()
                stream.fail(error if isinstance(error, RedlineError) else RedlineError(cause_of(error)))

    def fail_all(self, cause: str) -> None:
        """No replica is going to serve."""
        self._wake()
        for stream in list(self._streams.values()):
            self._remove(stream)
            stream.release_inputs()
            stream.fail(EngineDeadError(cause))

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():  # the caller may have been canceled
                waiter.set_result(None)
        self._waiters.clear()

    def _remove(self, stream: RequestStream) -> None:
        del self._streams[id(stream)]
        stream.held = False
        self._stats.held -= _outputs(stream)


def _outputs(stream: RequestStream) -> int:
    return len(stream.prompts) * stream.params.n
