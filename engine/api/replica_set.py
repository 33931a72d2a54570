"""The replicas of a server, in its first API process: started again when they die, added and drained while it serves.

A replica has a number, which another one gets once it is gone. All front ends learn of each change in the same order
(`engine.frontend.replica_events`). A replica is drained when every API process has reported that it sends no more
requests there and that none is left.
"""

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, TypeAlias

from engine.api.processes import ApiProcesses, threadsafe
from engine.api.restarts import MAX_RESTARTS, RestartPolicy
from engine.api.scale_state import ScaleState
from engine.errors import RedlineError, cause_of
from engine.frontend.connect import SupervisedClient
from engine.frontend.front_end_stats import MOST_REPLICAS, Boards
from engine.frontend.replica_events import (
    DrainCanceled,
    DrainTimeout,
    ReplicaDraining,
    ReplicaEvent,
    ReplicaLost,
    ReplicaRemoved,
    ReplicaStarting,
    ReplicaUp,
)
from engine.frontend.transport import CoreAddress
from engine.start import Engine

log = logging.getLogger("redline.serve")

Status: TypeAlias = Literal["up", "starting", "restarting", "draining", "ending", "dead", "removed"]
ACTIVE: tuple[Status, ...] = ("up", "starting", "restarting")
DRAIN_REPORT_S = 5.0  # for front ends to report that the requests of a drain have ended, once its time limit has passed
FREE: tuple[Status, ...] = ("dead", "removed")
# Starts a core with adapters, by name and folder; calls back if it ends, with the replica and the cause.
Start: TypeAlias = Callable[[tuple[tuple[str, str], ...], Callable[[int, str], None]], None]


class _Replica:
    """The state of one number."""

    def __init__(self, number: int, status: Status = "starting"):
        self.number = number
        self.status: Status = status
        self.cause = ""  # of its death
        self.restarts = RestartPolicy()
        self.attempt = 0  # the number of its core; reports about an earlier one are late
        self.is_starting = False  # a thread starts its core
        self.drain = 0  # the number of its drain among all drains
        self.undrained: set[int] = set()  # front ends that may still have requests there


class ReplicaSet:
    """All replicas of a server; lives in the event loop of its first API process."""

    _client: SupervisedClient  # this and the rest, once the event loop runs
    _processes: ApiProcesses
    _die: Callable[[str], None]
    _post_lost: Callable[[tuple[int, int, str]], None]
    _post_up: Callable[[tuple[int, int]], None]
    _post_failed: Callable[[tuple[int, int, str]], None]
    _post_stopped: Callable[[tuple[int, int]], None]

    def __init__(self, engine: Engine, boards: Boards, limit: int | None):
        """`limit` is the number of restarts of each replica within `engine.api.restarts.RESTART_PERIOD_S`; None:
        MAX_RESTARTS while there are several, else none."""
        self._engine = engine
        self._boards = boards
        self._given_limit = limit
        self._replicas = {number: _Replica(number, "up") for number in engine.cores}
        self._adapters = dict(engine.config.adapters)  # as the replicas had them last
        self._drains = itertools.count(1)
        self._tasks: set[asyncio.Future[None]] = set()
        self._ended = False
        self.state = ScaleState(0, len(self._replicas))

    def open(self, client: SupervisedClient, processes: ApiProcesses, die: Callable[[str], None]) -> None:
        """Start to watch the cores; called inside the event loop.

        Args:
            client: of this process.
            processes: the further API processes.
            die: called with the cause if no replica is left.
        """
        self._client, self._processes, self._die = client, processes, die
        self._post_lost, self._post_up = threadsafe(self._on_lost), threadsafe(self._on_up)
        self._post_failed, self._post_stopped = threadsafe(self._on_failed), threadsafe(self._on_stopped)
        client.router.on_drained = partial(self.drained, 0)
        self._engine.watch(lambda number, cause: self._post_lost((number, 0, cause)))

    def end(self) -> None:
        """The server ends: nothing is started any longer."""
        self._ended = True

    # ---------------------------------------------------------------------------------------------------- front ends

    def addresses(self, front_end: int) -> dict[int, CoreAddress]:
        """The cores by replica for a front end that begins; those that it is not to use have no address."""
        return {
            number: self._engine.address(number, front_end)
            if self._replicas[number].status in ("up", "draining")
            else CoreAddress(ready)
            for number, ready in list(self._engine.readies.items())
        }

    def events(self) -> Iterator[ReplicaEvent]:
        """What a front end that begins must know besides."""
        for number, one in self._replicas.items():
            served = number in self._engine.readies
            if one.status in ("restarting", "dead"):
                yield ReplicaLost(number, one.cause, one.status == "restarting")
            elif one.status in ("draining", "ending") and served and not one.is_starting:
                yield ReplicaDraining(number, one.drain)  # until it is removed, as for other front ends
            elif one.status != "up" and served:
                yield ReplicaRemoved(number)
            if one.status == "starting" or (one.status == "ending" and one.is_starting):
                yield ReplicaStarting(number)

    def drained(self, front_end: int, number: int, drain: int) -> None:
        """A front end has no requests on a draining replica."""
        one = self._replicas[number]
        if drain != one.drain:  # it is late
            return
        one.undrained.discard(front_end)
        if one.status == "draining" and not one.undrained:
            one.status = "ending"
            self._stop_core(one)

    def front_end_ended(self, front_end: int) -> None:
        """An API process has ended, and its requests with it."""
        for one in self._replicas.values():
            if one.status == "draining":
                self.drained(front_end, one.number, one.drain)

    def _announce(self, event: ReplicaEvent) -> None:
        self._client.apply(event)
        self._processes.announce(lambda _: event)

    # -------------------------------------------------------------------------------------------------------- deaths

    @property
    def _limit(self) -> int:
        if self._given_limit is not None:
            return self._given_limit
        return MAX_RESTARTS if self.state.target > 1 else 0

    def _on_lost(self, lost: tuple[int, int, str]) -> None:
        """A core is gone: it is started again if that is allowed; with the last one the server ends."""
        number, attempt, cause = lost
        one = self._replicas[number]
        if self._ended or attempt != one.attempt or one.status in ("ending", "dead", "removed"):
            return
        if one.status == "starting":
            self._on_failed(lost)
            return
        if one.status == "draining":
            self._announce(ReplicaLost(number, cause, False))
            one.status = "ending"
            self._stop_core(one)
            return
        if limit := self._limit:
            one.restarts.limit = limit
            worked = one.status == "up" and self._boards[number].total().core.steps > 0
            pause = one.restarts.next_pause(time.monotonic(), worked=worked)
            if pause is not None:
                one.status, one.cause = "restarting", f"{cause}; it is restarted (--restart-on-failure)"
                log.error("replica %d: %s", number, one.cause)
                self._announce(ReplicaLost(number, one.cause, True))
                one.attempt += 1
                asyncio.get_running_loop().call_later(pause, self._restart, one, one.attempt)
                return
            cause = f"{cause}; {one.restarts.why_not()}"
        one.status, one.cause = "dead", cause
        self._stop_core(one, expect_end=False)  # for its sockets
        if not any(other.status in ACTIVE for other in self._replicas.values()):
            count = len(self._replicas)
            self._die(cause if count == 1 else f"no replica is left; replica {number}: {cause}")
            return
        self._announce(ReplicaLost(number, cause, False))

    def _restart(self, one: _Replica, attempt: int) -> None:
        if not self._ended and one.attempt == attempt:
            self._start(one, partial(self._engine.restart, one.number))

    # -------------------------------------------------------------------------------------------------------- starts

    def _start(self, one: _Replica, start: Start) -> None:
        """Start the core of a replica."""
        one.is_starting = True
        task = asyncio.ensure_future(self._start_on_thread(one.number, one.attempt, start))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start_on_thread(self, number: int, attempt: int, start: Start) -> None:
        """Start a core with the adapters that the others have. Nothing waits for the thread when the server ends."""
        with contextlib.suppress(RedlineError):  # no other one answers
            self._adapters = await self._client.router.call_utility("adapters")
        adapters = tuple(self._adapters.items())

        def run() -> None:
            try:
                start(adapters, lambda replica, cause: self._post_lost((replica, attempt, cause)))
            except Exception as error:
                cause = str(error) if isinstance(error, RedlineError) else cause_of(error)
                self._post_failed((number, attempt, cause))
            else:
                self._post_up((number, attempt))

        threading.Thread(target=run, name="core-start", daemon=True).start()

    def _on_up(self, started: tuple[int, int]) -> None:
        number, attempt = started
        one = self._replicas[number]
        if self._ended or attempt != one.attempt:
            return
        one.is_starting = False
        if one.status == "ending":  # it is not wanted any longer
            self._stop_core(one)
            return
        if one.status not in ("starting", "restarting"):  # it has ended already
            return
        if one.status == "restarting":
            self._boards[number].stats[0].count_event("restart")
            log.warning("replica %d serves again, as process %d", number, self._engine.readies[number].process_id)
        else:
            log.info("replica %d serves, as process %d", number, self._engine.readies[number].process_id)
        one.status = "up"
        self._client.apply(ReplicaUp(number, self._engine.address(number)))
        self._processes.announce(lambda front_end: ReplicaUp(number, self._engine.address(number, front_end)))

    def _on_failed(self, failed: tuple[int, int, str]) -> None:
        number, attempt, cause = failed
        one = self._replicas[number]
        if self._ended or attempt != one.attempt:
            return
        one.is_starting = False
        if one.status == "restarting":
            self._on_lost((number, attempt, f"its restart failed: {cause}"))
            return
        starting, one.status = one.status == "starting", "removed"
        self._announce(ReplicaRemoved(number))
        if starting:
            active = sum(other.status in ACTIVE for other in self._replicas.values())
            log.error("replica %d could not be started: %s", number, cause)
            self._change(active, f"replica {number} could not be started: {cause}", self.state.asked)

    # ------------------------------------------------------------------------------------------------- their number

    async def scale(self, target: int, drain_timeout: float | None = None) -> ScaleState:
        """Begin to add or to drain replicas; see `Scaling`."""
        return self.scale_for(target, drain_timeout, (0, 0))

    def scale_for(self, target: int, drain_timeout: float | None, asked: tuple[int, int]) -> ScaleState:
        """The same, for the request `asked` of a front end."""
        every = list(self._replicas.values())
        active = [one for one in every if one.status in ACTIVE]
        draining = [one for one in every if one.status == "draining"]
        back = draining[: max(0, target - len(active))]
        ending = len(draining) - len(back) + sum(one.status == "ending" for one in every)
        if target + ending > MOST_REPLICAS:
            error = f"{target} replicas and {ending} ending ones exceed {MOST_REPLICAS}: wait until these have ended"
            return self._change(len(active), error, asked)
        added = max(0, target - len(active) - len(back))
        if added:
            try:
                self._engine.check_room(added)
            except RedlineError as refusal:
                return self._change(len(active), str(refusal), asked)
        log.warning("scaling from %d to %d replicas", len(active), target)
        for one in back:
            self._take_back(one)
        for _ in range(added):
            self._add(target)
        # Those that do not serve yet go first, then those that came last.
        active.sort(key=lambda one: (one.status == "up", -one.number))
        for one in active[: max(0, len(active) - target)]:
            self._remove(one)
        if drain_timeout is not None:
            self._limit_drains(drain_timeout)
        return self._change(target, "", asked)

    def _change(self, target: int, error: str, asked: tuple[int, int]) -> ScaleState:
        self.state = ScaleState(self.state.revision + 1, target, error, asked)
        self._processes.announce_state(self.state)
        return self.state

    def _add(self, count: int) -> None:
        free = (number for number, one in self._replicas.items() if one.status in FREE)
        number = min(free, default=len(self._replicas))
        earlier = self._replicas.get(number)
        one = self._replicas[number] = _Replica(number)
        one.attempt = 0 if earlier is None else earlier.attempt + 1
        self._announce(ReplicaStarting(number))
        self._start(one, partial(self._engine.add, number, count))

    def _remove(self, one: _Replica) -> None:
        if one.status == "up":
            one.status = "draining"
            one.drain = next(self._drains)
            one.undrained = {0, *self._processes.running}
            self._announce(ReplicaDraining(one.number, one.drain))
        elif one.is_starting:
            one.status = "ending"
            self._stop_core(one, expect_end=False)  # `_on_failed` follows
        else:  # it waits until it is to be restarted
            one.attempt += 1
            one.status = "removed"
            self._announce(ReplicaRemoved(one.number))

    def _take_back(self, one: _Replica) -> None:
        """Have a draining replica serve again, which needs neither a start nor more memory."""
        one.status = "up"
        log.warning("replica %d is drained no longer", one.number)
        self._announce(DrainCanceled(one.number))

    def _limit_drains(self, seconds: float) -> None:
        """End the requests of all draining replicas after so many seconds; the shortest limit of a drain holds."""
        for one in self._replicas.values():
            if one.status == "draining":
                asyncio.get_running_loop().call_later(seconds, self._end_drain, one, one.drain, seconds)

    def _end_drain(self, one: _Replica, drain: int, seconds: float) -> None:
        if self._ended or one.status != "draining" or one.drain != drain:
            return
        limit = f"this request was not done within {seconds:g} s (redline scale --drain-timeout)"
        self._announce(DrainTimeout(one.number, f"replica {one.number} was removed, and {limit}"))
        asyncio.get_running_loop().call_later(DRAIN_REPORT_S, self._stop_drained, one, drain)

    def _stop_drained(self, one: _Replica, drain: int) -> None:
        """Stop a replica although a front end, which hangs, has not reported that its requests have ended."""
        for front_end in list(one.undrained):
            self.drained(front_end, one.number, drain)

    def _stop_core(self, one: _Replica, *, expect_end: bool = True) -> None:
        """Stop the core of a replica on a thread; `expect_end`: it is removed then."""
        core, number, attempt = self._engine.cores.get(one.number), one.number, one.attempt

        def run() -> None:
            if core is not None:
                core.stop()
            if expect_end:
                self._post_stopped((number, attempt))

        threading.Thread(target=run, name="core-stop", daemon=True).start()

    def _on_stopped(self, stopped: tuple[int, int]) -> None:
        number, attempt = stopped
        one = self._replicas[number]
        if self._ended or attempt != one.attempt:
            return
        one.status = "removed"
        log.warning("replica %d was removed", number)
        self._announce(ReplicaRemoved(number))
