"""The further API processes of a server: started, watched, restarted when one ends by itself, and ended together.

They hold no state of the engine; each is notified of all changes of replicas from its start on. When one ends, the core
aborts its requests and the others continue to serve. Its listening socket stays open here, so that connections wait for
its successor instead of being refused.
"""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import msgspec

from engine.api.http_server import FORCED_GRACE_S
from engine.api.key_limit import KeyLoads
from engine.api.process import ApiProcess, ApiProcessOptions, Drained, ScaleAsked
from engine.api.restarts import RestartPolicy
from engine.api.scale_state import ScaleState
from engine.errors import RedlineError
from engine.frontend.front_end_stats import Boards
from engine.frontend.replica_events import ReplicaEvent
from engine.frontend.router import Router
from engine.frontend.transport import CoreAddress

log = logging.getLogger("redline.api")

# A successor numbers its requests from here on, its own successor from twice as far, so that handles never recur.
GENERATION = 1 << 40
ABORT_TIMEOUT_S = 2.0  # for the cores to confirm that they have aborted a process's requests


class Replicas(Protocol):
    """The part of a ReplicaSet that API processes use."""

    state: ScaleState

    def addresses(self, front_end: int) -> dict[int, CoreAddress]: ...

    def events(self) -> Iterable[ReplicaEvent]: ...

    def drained(self, front_end: int, number: int, drain: int) -> None: ...

    def front_end_ended(self, front_end: int) -> None: ...

    def scale_for(self, target: int, drain_timeout: float | None, asked: tuple[int, int]) -> ScaleState: ...


class _Place:
    """A front-end number and its socket, with the process that has them now."""

    def __init__(self, options: ApiProcessOptions, listener: socket.socket, boards: Boards, replicas: Replicas):
        self.options = options
        self.listener = listener
        self.boards = boards
        self.replicas = replicas
        self.restarts = RestartPolicy()
        self.process = self.start()
        self.up = False

    @property
    def front_end(self) -> int:
        return self.options.front_end

    def start(self) -> ApiProcess:
        """Start a process that knows the replicas as they are now; it must be notified of what follows."""
        cores = self.replicas.addresses(self.front_end)
        for replica in cores:
            self.boards[replica].take_over(self.front_end)
        options = msgspec.structs.replace(
            self.options,
            cores=cores,
            events=tuple(self.replicas.events()),
            scale_state=self.replicas.state,
        )
        return ApiProcess(options, self.listener, self.boards.descriptor)


class ApiProcesses:
    """All API processes of a server except the first, which owns this object."""

    def __init__(
        self,
        options: Sequence[ApiProcessOptions],
        listeners: Sequence[socket.socket],
        boards: Boards,
        replicas: Replicas,
        key_loads: KeyLoads | None = None,
    ):
        """Start one process for each of `options` and `listeners`; `wait_up` waits for them.

        `boards` and `key_loads` are the counters that all API processes share; `replicas` are those of the server.
        """
        self._boards = boards
        self._replicas = replicas
        self._key_loads = key_loads
        self._places: list[_Place] = []
        self._stopping = False
        self._watched: list[asyncio.Future[None]] = []
        for one, listener in zip(options, listeners, strict=True):
            self._places.append(_Place(one, listener, boards, replicas))

    def wait_up(self) -> None:
        """Block until all are ready to serve; raises the RedlineError of one that is not."""
        for place in self._places:
            place.process.wait_up()
            place.up = True

    def watch(self, client: Router, die: Callable[[str], None]) -> None:
        """In the event loop: restart processes that end by themselves; if too often, call `die` with the cause."""
        for place in self._places:
            self._listen(place)
        self._watched = [asyncio.ensure_future(self._keep(place, client, die)) for place in self._places]

    async def ended(self) -> None:
        """Wait until all have ended and none is restarted."""
        await asyncio.gather(*self._watched)

    def _listen(self, place: _Place) -> None:
        """Do what a process asks for."""

        def on_note(note: Drained | ScaleAsked) -> None:
            if isinstance(note, Drained):
                self._replicas.drained(place.front_end, note.replica, note.drain)
            else:
                self._replicas.scale_for(note.target, note.drain_timeout, (place.front_end, note.number))

        place.process.on_note = threadsafe(on_note)

    async def _keep(self, place: _Place, client: Router, die: Callable[[str], None]) -> None:
        while True:
            cause = await self._end_of(place)
            place.up = False
            if cause is None or self._stopping:
                return
            self._replicas.front_end_ended(place.front_end)
            pause = place.restarts.next_pause(time.monotonic())
            if pause is None:
                die(f"{cause}; {place.restarts.why_not()}")
                return
            log.error("%s; its requests are aborted, and it is restarted in %g s", cause, pause)
            await self._forget_requests(place, client)
            await asyncio.sleep(pause)
            if self._stopping:
                return
            place.process = place.start()
            self._listen(place)

    async def _end_of(self, place: _Place) -> str | None:
        """Wait for the end of a process, which may still be starting; the cause, or None after `finish` or `end`."""
        process = place.process
        if not place.up:
            try:
                await asyncio.to_thread(process.wait_up)
            except RedlineError as error:
                return str(error)
            place.up = True
            if self._stopping:
                process.finish()
            if place.restarts.has_ended:
                log.info("%s is serving", process.name)
        ended: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        process.watch(threadsafe(lambda cause: None if ended.done() else ended.set_result(cause)))
        return await ended

    async def _forget_requests(self, place: _Place, client: Router) -> None:
        """Have the cores abort the requests of a process that ended, and give its successor new handles."""
        options = place.options
        if self._key_loads is not None:
            self._key_loads.clear(options.front_end)
        for core in client.cores:
            self._boards[core.replica].take_over(options.front_end)
        first = options.first_sequence // GENERATION * GENERATION + GENERATION
        place.options = msgspec.structs.replace(options, first_sequence=first)
        arguments = {"front_end": options.front_end, "first_sequence": first}
        calls = [core.call_utility("drop_front_end", **arguments) for core in client.cores]
        # A core that is gone has no requests. A core that hangs gets the message when it continues.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), ABORT_TIMEOUT_S)

    # -------------------------------------------------------------------------------------------------- replicas

    @property
    def running(self) -> list[int]:
        """The front-end numbers of the processes that may serve requests, or soon will."""
        return [place.front_end for place in self._places if place.process.returncode is None]

    def announce(self, event: Callable[[int], ReplicaEvent]) -> None:
        """Notify all of a change of a replica; `event` makes what a front end is sent."""
        for place in self._places:
            place.process.announce(event(place.front_end))

    def announce_state(self, state: ScaleState) -> None:
        """Notify all how many replicas there are to be."""
        for place in self._places:
            place.process.announce_state(state)

    # ----------------------------------------------------------------------------------------------------- the end

    def finish(self) -> None:
        """Let all end when their requests are done."""
        self._stop()
        for place in self._places:
            place.process.finish()

    def end(self, cause: str, grace_s: float) -> None:
        """Have all report the cause to their clients and end; by force if they take too long."""
        self._stop()
        for place in self._places:
            place.process.end(cause)
        asyncio.get_running_loop().call_later(2 * grace_s + FORCED_GRACE_S, self.kill)

    def kill(self) -> None:
        """End by force all that still run."""
        self._stop()
        for place in self._places:
            place.process.end_by_force()

    def _stop(self) -> None:
        """Stop restarting, close the sockets here, and kill processes that still start: they have no requests."""
        self._stopping = True
        for place in self._places:
            place.listener.close()
            if not place.up:
                place.process.end_by_force()


def threadsafe(call: Callable[[Any], None]) -> Callable[[Any], None]:
    """A function that schedules the call in this loop, from any thread; it does nothing once the loop is closed."""
    loop = asyncio.get_running_loop()

    def from_thread(argument: Any) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(call, argument)

    return from_thread
