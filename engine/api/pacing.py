"""Begins requests one at a time, so that many that come at once leave room for everything else.

The event loop runs everything that is ready before it looks for new events. If 1,000 requests begin in the same turn,
each of their stages takes 1,000 times as long as one, and a health check or the tokens of a stream wait for all of
them. Here the first request of a turn begins at once, and each later turn begins one that waits. A request holds
nothing while it waits for its body or for a thread, so no slow client delays others.
"""

import asyncio
from collections import deque

from starlette.types import ASGIApp, Receive, Scope, Send

PROBES = frozenset({"/ping"})  # that some platforms send as POST


class PacedRequests:
    """Begins POST requests but probes one per turn of the event loop, in the order of arrival; others at once."""

    def __init__(self, app: ASGIApp):
        self._app = app
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._begun = False  # a request has begun in this turn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] not in PROBES:
            await self._turn()
        await self._app(scope, receive, send)

    async def _turn(self) -> None:
        loop = asyncio.get_running_loop()
        if self._begun:
            mine = loop.create_future()
            self._waiting.append(mine)
            await mine
        else:
            self._begun = True
            loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():  # its task was cancelled
                waiting.set_result(None)
                asyncio.get_running_loop().call_soon(self._next_turn)
                return
        self._begun = False
