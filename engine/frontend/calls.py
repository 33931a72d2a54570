"""Calls of all replicas of an engine: done by all or by none, and by none for ever.

A replica that hangs answers nothing, not even that it hangs if its whole process was stopped. So one that takes long is
asked something that its loop answers at once; without an answer to that it counts as hanging. What was asked of it
still stands in its inbox: what takes that back is sent behind it.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from engine.errors import EngineDeadError, RedlineError

if TYPE_CHECKING:
    from engine.frontend.router import Replica

log = logging.getLogger("redline.router")

PATIENCE_S = 8.0  # for an answer that takes no work
WORK = frozenset({"load_adapter", "unload_adapter"})  # what may take longer


class NoAnswerError(EngineDeadError):
    """A replica hangs; what it was asked may be done later."""

    def __init__(self, message: str, pending: "asyncio.Future[Any] | None" = None):
        super().__init__(message)
        self.pending = pending


class Calls:
    """The calls of a Router, over its replicas that live; in its event loop."""

    def __init__(self, living: "Callable[[], Sequence[Replica]]", cause: Callable[[], str]):
        """`living` raises EngineDeadError if none does; `cause` says why all have died."""
        self._living = living
        self._cause = cause
        self._behind: set[asyncio.Future[Any]] = set()  # what is sent behind a call that wasn't answered

    async def all_do(self, method: str, arguments: dict[str, Any]) -> list[Any]:
        """The answers of all that live to the end; RedlineError if one of them can't do it."""
        living = self._living()
        if method == "load_adapter":
            return await self._load(living, arguments)
        if method == "unload_adapter":
            return await self._unload(living, arguments)
        return self._results(await _ask_all(living, method, arguments))

    async def some_do(self, method: str, arguments: dict[str, Any]) -> list[Any]:
        """The answers of those that don't hang; NoAnswerError if all do."""
        living = self._living()
        able = [replica for replica in living if not replica.hung] or living
        answers = await _ask_all(able, method, arguments)
        given = [answer for answer in answers if not isinstance(answer, NoAnswerError)]
        return self._results(given or answers)

    async def _load(self, living: "Sequence[Replica]", arguments: dict[str, Any]) -> list[Any]:
        for replica in living:
            if replica.hung:
                raise NoAnswerError(f"replica {replica.number} hangs, try again when it is back: {replica.hung}")
        answers = await _ask_all(living, "load_adapter", arguments)
        if any(map(_failed, answers)):
            undo = {"name": arguments["name"]}
            for replica, answer in zip(living, answers, strict=True):
                if isinstance(answer, NoAnswerError):
                    self._send_behind(self._unload_late(replica, answer, undo))
                elif not isinstance(answer, Exception):
                    _warn("loading an adapter could not be undone", await _ask(replica, "unload_adapter", undo))
        return self._results(answers)

    async def _unload_late(self, replica: "Replica", answer: NoAnswerError, undo: dict[str, Any]) -> None:
        """Undo a load that a hanging replica may yet do."""
        if answer.pending is not None:
            try:
                await answer.pending
            except RedlineError:  # nothing was loaded
                return
            await replica.call("unload_adapter", **undo)

    async def _unload(self, living: "Sequence[Replica]", arguments: dict[str, Any]) -> list[Any]:
        """In two steps, see `engine.core.adapters`: requests between them wait, and fail only if all unload."""
        name = {"name": arguments["name"]}
        answers = await _ask_all(living, "hold_adapter", name)
        if any(map(_failed, answers)):
            for replica, answer in zip(living, answers, strict=True):
                if not isinstance(answer, Exception) or isinstance(answer, NoAnswerError):
                    self._send_behind(replica.call("keep_adapter", **name))
            return self._results(answers)
        return self._results(await _ask_all(living, "unload_adapter", name))

    def _send_behind(self, call: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.ensure_future(call)
        self._behind.add(task)
        task.add_done_callback(self._sent)

    def _sent(self, task: "asyncio.Future[Any]") -> None:
        self._behind.discard(task)
        if not task.cancelled():
            _warn("a call could not be undone", task.exception())

    def _results(self, answers: list[Any]) -> list[Any]:
        """What is no exception; raises the first that isn't merely the end of a replica."""
        for answer in answers:
            if _failed(answer):
                raise answer
        results = [answer for answer in answers if not isinstance(answer, Exception)]
        if not results:
            raise EngineDeadError(self._cause())
        return results


def _failed(answer: Any) -> bool:
    """Whether a replica that lives can't do it; one that died needn't."""
    dead = isinstance(answer, EngineDeadError) and not isinstance(answer, NoAnswerError)
    return isinstance(answer, RedlineError) and not dead


def _warn(what: str, answer: Any) -> None:
    if _failed(answer):
        log.warning("%s: %s", what, answer)


async def _ask_all(replicas: "Sequence[Replica]", method: str, arguments: dict[str, Any]) -> list[Any]:
    """Answers in the order of the replicas; a RedlineError is one."""
    return await asyncio.gather(*(_ask(replica, method, arguments) for replica in replicas))


async def _ask(replica: "Replica", method: str, arguments: dict[str, Any]) -> Any:
    asked = asyncio.ensure_future(replica.call(method, **arguments))
    while not await _ended(asked):
        if replica.hung:
            return _no_answer(f"replica {replica.number} hangs: {replica.hung}", asked)
        if method not in WORK or not await _lives(replica):
            return _no_answer(f"replica {replica.number} doesn't answer", asked)
    error = asked.exception()
    if error is not None and not isinstance(error, RedlineError):
        raise error
    return asked.result() if error is None else error


async def _ended(asked: "asyncio.Future[Any]") -> bool:
    done, _ = await asyncio.wait({asked}, timeout=PATIENCE_S)
    return bool(done)


async def _lives(replica: "Replica") -> bool:
    """Whether its loop answers."""
    ping = asyncio.ensure_future(replica.call("adapters"))
    ping.add_done_callback(_consume)
    return await _ended(ping)


def _no_answer(message: str, asked: "asyncio.Future[Any]") -> NoAnswerError:
    asked.add_done_callback(_consume)
    return NoAnswerError(message, asked)


def _consume(done: "asyncio.Future[Any]") -> None:
    """Its error is nobody's any more."""
    if not done.cancelled():
        done.exception()
