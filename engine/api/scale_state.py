"""How many replicas a server is to have, and how an API process changes that."""

import asyncio
import itertools
from collections.abc import Callable
from typing import Protocol

import msgspec

from engine.api.error_responses import ApiError

ANSWER_S = 10.0  # for the first API process


class ScaleState(msgspec.Struct, frozen=True):
    """How many replicas the server is to have; the same in all its processes.

    Args:
        revision: how often it has been changed.
        target: replicas.
        error: why the last change failed; empty: it did not.
        asked: front end and number of the request that made this change.
    """

    revision: int
    target: int
    error: str = ""
    asked: tuple[int, int] = (-1, 0)


class Scaling(Protocol):
    """Changes the number of replicas, as an API process sees it."""

    @property
    def state(self) -> ScaleState: ...

    async def scale(self, target: int, drain_timeout: float | None = None) -> ScaleState:
        """Begin to add or to drain replicas; returns the state right after that.

        `drain_timeout`: seconds after which the requests of all draining replicas are ended; None: no limit, or the one
        that an earlier call has set.
        """
        ...


class RemoteScaling:
    """The scaling of a further API process, which asks the first one."""

    def __init__(self, front_end: int, state: ScaleState, ask: Callable[[int, int, float | None], None]):
        """`ask` sends the number of a request and the arguments of `scale` to the first process."""
        self.state = state
        self._front_end = front_end
        self._ask = ask
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[ScaleState]] = {}

    async def scale(self, target: int, drain_timeout: float | None = None) -> ScaleState:
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._ask(number, target, drain_timeout)
        try:
            return await asyncio.wait_for(answer, ANSWER_S)
        except TimeoutError:
            raise ApiError(503, "the server's first process does not answer; try again") from None
        finally:
            del self._waiting[number]

    def state_changed(self, state: ScaleState) -> None:
        """The first process has reported a state."""
        self.state = state
        front_end, number = state.asked
        answer = self._waiting.get(number) if front_end == self._front_end else None
        if answer is not None and not answer.done():
            answer.set_result(state)
