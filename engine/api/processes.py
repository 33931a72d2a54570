"""The further API processes of a server: started, watched, started again when one ends by itself, and ended together.

They hold no state of the engine: what one of them had is aborted in the core, and the others serve on. Its listening
socket stays open here meanwhile, so that connections wait for its successor instead of being refused.
"""

import asyncio
import contextlib
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from engine.api.process import ApiProcess, Orders
from engine.api.server import FORCED_GRACE_S
from engine.errors import RedlineError
from engine.frontend.connect import EngineClient
from engine.frontend.router import Router
from engine.frontend.stats import Board

log = logging.getLogger("redline.api")

# A process that ended so often within the period ends the server: what kills it will kill it again.
MAX_RESTARTS = 5
RESTART_PERIOD_S = 600.0
BACK_OFF_S = 0.5  # before the first new start; twice as long before each further one
# Requests of a successor are numbered from here on, those of its own successor from twice as far: handles never recur.
GENERATION = 1 << 40
ANSWER_S = 2.0  # that a core may take to say that it has aborted a process's requests


class _Place:
    """One front-end number, with its socket and the process that has them now."""

    def __init__(self, orders: Orders, listener: socket.socket, boards: Sequence[Board]):
        self.orders = orders
        self.listener = listener
        self.descriptors = [board.descriptor for board in boards]
        self.process = self.start()
        self.up = False
        self.ends: deque[float] = deque()  # when its processes ended by themselves

    def start(self) -> ApiProcess:
        return ApiProcess(self.orders, self.listener, self.descriptors)


class ApiProcesses:
    """All of a server's API processes but the first, which this is part of."""

    def __init__(self, orders: Sequence[Orders], listeners: Sequence[socket.socket], boards: Sequence[Board]):
        """Start them, one for each of `orders` and `listeners`; `wait_up` waits for them."""
        self._boards = boards
        self._places: list[_Place] = []
        self._stopping = False
        self._lost: dict[int, str] = {}  # replicas, and why
        self._watched: list[asyncio.Future[None]] = []
        for one, listener in zip(orders, listeners, strict=True):
            self._places.append(_Place(one, listener, boards))

    def wait_up(self) -> None:
        """Block until all could serve; raises the RedlineError that says why one can't."""
        for place in self._places:
            place.process.wait_up()
            place.up = True

    def watch(self, client: EngineClient, die: Callable[[str], None]) -> None:
        """From inside the event loop: restart a process that ends by itself; too often, and `die` gets the cause."""
        self._watched = [asyncio.ensure_future(self._keep(place, client, die)) for place in self._places]

    async def ended(self) -> None:
        """Wait until all have ended for good."""
        await asyncio.gather(*self._watched)

    async def _keep(self, place: _Place, client: EngineClient, die: Callable[[str], None]) -> None:
        while True:
            cause = await self._end_of(place)
            place.up = False
            if cause is None or self._stopping:
                return
            now = time.monotonic()
            place.ends.append(now)
            while now - place.ends[0] > RESTART_PERIOD_S:
                place.ends.popleft()
            if len(place.ends) > MAX_RESTARTS:
                die(f"{cause}; that was the {len(place.ends)}th end within {RESTART_PERIOD_S:g} s, after which it is "
                    "not started again")  # fmt: skip
                return
            pause = BACK_OFF_S * 2 ** (len(place.ends) - 1)
            log.error("%s; its requests are aborted, and it starts again in %g s", cause, pause)
            await self._forget_requests(place, client)
            await asyncio.sleep(pause)
            if self._stopping:
                return
            place.process = place.start()

    async def _end_of(self, place: _Place) -> str | None:
        """Wait for the end of a process, which may still be starting; the cause, None if it was told to end."""
        process = place.process
        if not place.up:
            try:
                await asyncio.to_thread(process.wait_up)
            except RedlineError as error:
                return str(error)
            place.up = True
            for replica, cause in self._lost.items():
                process.lose(replica, cause)
            if self._stopping:
                process.finish()
            if place.ends:
                log.info("%s serves", process.name)
        ended: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        process.watch(threadsafe(lambda cause: None if ended.done() else ended.set_result(cause)))
        return await ended

    async def _forget_requests(self, place: _Place, client: EngineClient) -> None:
        """Have the core abort what the process had; its successor's requests get other handles."""
        orders = place.orders
        for board in self._boards:
            board.stats[orders.front_end].live = 0
            board.stats[orders.front_end].load = 0
        first = orders.first_sequence // GENERATION * GENERATION + GENERATION
        place.orders = msgspec.structs.replace(orders, first_sequence=first)
        cores = client.replicas if isinstance(client, Router) else (client,)
        calls = [core.call("drop_front_end", front_end=orders.front_end, first_sequence=first) for core in cores]
        # A core that is gone needs none of it, and one that hangs has the message when it goes on.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), ANSWER_S)

    # ----------------------------------------------------------------------------------------------------- the end

    def lose(self, replica: int, cause: str) -> None:
        """Tell all that a replica is gone, and that others serve on."""
        self._lost[replica] = cause
        for place in self._places:
            if place.up:
                place.process.lose(replica, cause)

    def finish(self) -> None:
        """Let all end when their requests are done."""
        self._stop()
        for place in self._places:
            place.process.finish()

    def end(self, cause: str, grace_s: float) -> None:
        """Have all tell their clients the cause and end, by force where they take too long."""
        self._stop()
        for place in self._places:
            place.process.end(cause)
        asyncio.get_running_loop().call_later(2 * grace_s + FORCED_GRACE_S, self.kill)

    def kill(self) -> None:
        """End all by force that still run."""
        self._stop()
        for place in self._places:
            place.process.kill()

    def _stop(self) -> None:
        """No process is started again, and their sockets are theirs alone; one that still starts has no requests."""
        self._stopping = True
        for place in self._places:
            place.listener.close()
            if not place.up:
                place.process.kill()


def threadsafe(call: Callable[[Any], None]) -> Callable[[Any], None]:
    """The same call, made in this loop from any thread; nothing once the loop is closed."""
    loop = asyncio.get_running_loop()

    def from_thread(argument: Any) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(call, argument)

    return from_thread
