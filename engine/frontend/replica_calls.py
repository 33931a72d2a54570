"""Utility calls to all replicas of an engine. Adapters are loaded on all or on none, and no call waits forever.

A replica that hangs does not answer; if its whole process was stopped, it does not even report that it hangs. A replica
that takes long is therefore sent a call that its loop answers at once. If that is not answered either, the replica
counts as hanging. The first call is still in its inbox then, so the call that undoes it is sent after it.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from engine.errors import EngineDeadError, RedlineError
from engine.frontend.core_client import CoreClient

log = logging.getLogger("redline.router")

PATIENCE_S = 8.0  # for the answer to a call that needs no work
SLOW_METHODS = frozenset({"load_adapter", "unload_adapter", "check_grammar"})  # these may take longer


class NoAnswerError(EngineDeadError):
    """A replica hangs. It may still execute the call later (`pending`)."""

    def __init__(self, message: str, pending: "asyncio.Future[Any] | None" = None):
        super().__init__(message)
        self.pending = pending


class ReplicaCalls:
    """The utility calls of a Router to its living replicas; lives in its event loop."""

    def __init__(self, living: Callable[[], Sequence[CoreClient]], cause: Callable[[], str]):
        """`living` returns the living replicas, or raises EngineDeadError; `cause` is why there are none."""
        self._living = living
        self._cause = cause
        self._late: set[asyncio.Future[Any]] = set()  # calls that undo calls without an answer

    async def call_all(self, method: str, arguments: dict[str, Any]) -> list[Any]:
        """The answers of all replicas that stay alive. Raises RedlineError if one of them fails."""
        living = self._living()
        if method == "load_adapter":
            return await self._load(living, arguments)
        if method == "unload_adapter":
            return await self._unload(living, arguments)
        return self._results(await _call_all(living, method, arguments))

    async def call_responsive(self, method: str, arguments: dict[str, Any]) -> list[Any]:
        """The answers of the replicas that do not hang. Raises NoAnswerError if all hang."""
        living = self._living()
        able = [replica for replica in living if not replica.hung] or living
        answers = await _call_all(able, method, arguments)
        given = [answer for answer in answers if not isinstance(answer, NoAnswerError)]
        return self._results(given or answers)

    async def _load(self, living: Sequence[CoreClient], arguments: dict[str, Any]) -> list[Any]:
        for replica in living:
            if replica.hung:
                raise NoAnswerError(f"{replica.name} hangs; try again when it has recovered: {replica.hung}")
        answers = await _call_all(living, "load_adapter", arguments)
        if any(map(_failed, answers)):
            undo = {"name": arguments["name"]}
            for replica, answer in zip(living, answers, strict=True):
                if isinstance(answer, NoAnswerError):
                    self._send_late(self._unload_late(replica, answer, undo))
                elif not isinstance(answer, Exception):
                    _warn("loading an adapter could not be undone", await _call_one(replica, "unload_adapter", undo))
        return self._results(answers)

    async def _unload_late(self, replica: CoreClient, answer: NoAnswerError, undo: dict[str, Any]) -> None:
        """Undo a load that a hanging replica may still execute."""
        if answer.pending is not None:
            try:
                await answer.pending
            except RedlineError:  # nothing was loaded
                return
            await replica.call_utility("unload_adapter", **undo)

    async def _unload(self, living: Sequence[CoreClient], arguments: dict[str, Any]) -> list[Any]:
        """Unload in two steps (see `engine.core.adapters`): requests in between wait, and fail only if all unload."""
        name = {"name": arguments["name"]}
        answers = await _call_all(living, "hold_adapter", name)
        if any(map(_failed, answers)):
            for replica, answer in zip(living, answers, strict=True):
                if not isinstance(answer, Exception) or isinstance(answer, NoAnswerError):
                    self._send_late(replica.call_utility("keep_adapter", **name))
            return self._results(answers)
        return self._results(await _call_all(living, "unload_adapter", name))

    def _send_late(self, call: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.ensure_future(call)
        self._late.add(task)
        task.add_done_callback(self._late_done)

    def _late_done(self, task: "asyncio.Future[Any]") -> None:
        self._late.discard(task)
        if not task.cancelled():
            _warn("a call could not be undone", task.exception())

    def _results(self, answers: list[Any]) -> list[Any]:
        """The answers that are not errors; raises the first error other than the death of a replica."""
        for answer in answers:
            if _failed(answer):
                raise answer
        results = [answer for answer in answers if not isinstance(answer, Exception)]
        if not results:
            raise EngineDeadError(self._cause())
        return results


def _failed(answer: Any) -> bool:
    """Whether a living replica could not execute the call. A dead one does not count."""
    dead = isinstance(answer, EngineDeadError) and not isinstance(answer, NoAnswerError)
    return isinstance(answer, RedlineError) and not dead


def _warn(what: str, answer: Any) -> None:
    if _failed(answer):
        log.warning("%s: %s", what, answer)


async def _call_all(replicas: Sequence[CoreClient], method: str, arguments: dict[str, Any]) -> list[Any]:
    """Answers in the order of the replicas; a RedlineError is an answer."""
    return await asyncio.gather(*(_call_one(replica, method, arguments) for replica in replicas))


async def _call_one(replica: CoreClient, method: str, arguments: dict[str, Any]) -> Any:
    call = asyncio.ensure_future(replica.call_utility(method, **arguments))
    while not await _done_in_time(call):
        if replica.hung:
            return _no_answer(f"{replica.name} hangs: {replica.hung}", call)
        if method not in SLOW_METHODS or not await _is_responsive(replica):
            return _no_answer(f"{replica.name} doesn't answer", call)
    error = call.exception()
    if error is not None and not isinstance(error, RedlineError):
        raise error
    return call.result() if error is None else error


async def _done_in_time(call: "asyncio.Future[Any]") -> bool:
    done, _ = await asyncio.wait({call}, timeout=PATIENCE_S)
    return bool(done)


async def _is_responsive(replica: CoreClient) -> bool:
    """Whether the replica's loop answers."""
    ping = asyncio.ensure_future(replica.call_utility("adapters"))
    ping.add_done_callback(_consume_error)
    return await _done_in_time(ping)


def _no_answer(message: str, call: "asyncio.Future[Any]") -> NoAnswerError:
    call.add_done_callback(_consume_error)
    return NoAnswerError(message, call)


def _consume_error(done: "asyncio.Future[Any]") -> None:
    """Retrieve the error of a call that nothing awaits, or asyncio would log it."""
    if not done.cancelled():
        done.exception()
