"""Detects a step that hangs, logs where it hangs, and ends the engine if the step does not return.

After `--step-timeout` the cause is logged with the stacks of all threads of the EngineCore and its ranks, and front
ends respond to /health with 503. If the step returns, the engine is healthy again. After twice the timeout the engine
ends with that cause.
"""

import faulthandler
import itertools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from engine.children import RankHandle
from engine.clock import Clock
from engine.core.protocols import Executor

log = logging.getLogger("redline.core")

GIVE_UP_AFTER = 2  # times the timeout
CALL_TIMEOUT_S = 600.0  # of calls, such as loading an adapter from a slow disk; the step timeout if that is longer
FORWARD, SAMPLE, LOOP, CALL = "forward", "sample", "loop", "call"


@dataclass(slots=True)
class Task:
    """One task that was submitted to the executor, or a turn of the loop."""

    phase: str
    step: int
    submitted_at: float
    method: str = ""  # of a call


class WatchedExecutor:
    """An executor whose results wake the loop, and which tracks the task in progress."""

    def __init__(self, inner: Executor, clock: Clock, wake: Callable[[], None]):
        self._inner = inner
        self._clock = clock
        self._wake = wake
        self._tasks: dict[int, Task] = {}  # in the order of submission
        self._keys = itertools.count()
        self._done_at = clock.now()
        self._forward: Task | None = None  # its step's number is known only when the step is sampled
        self.failed = False  # a step failed: the engine ends with its cause
        self.shutdown = inner.shutdown

    def submit(self, step: bytes) -> "Future[None]":
        self._forward = Task(FORWARD, 0, self._clock.now())
        return self._watch(self._forward, self._inner.submit(step))

    def sample(self, step: int, masks: bytes = b"") -> "Future[bytes]":
        if self._forward is not None:
            self._forward.step, self._forward = step, None
        result = self._watch(Task(SAMPLE, step, self._clock.now()), self._inner.sample(step, masks))
        result.add_done_callback(lambda _: self._wake())
        return result

    def call(self, method: str, arguments: dict[str, Any]) -> "Future[Any]":
        """Steps submitted during a call wait for it; their time counts from the end of the call."""
        return self._watch(Task(CALL, 0, self._clock.now(), method), self._inner.call(method, arguments))

    def _watch(self, task: Task, future: "Future[Any]") -> "Future[Any]":
        key = next(self._keys)
        self._tasks[key] = task
        future.add_done_callback(lambda done: self._end(key, done))
        return future

    def _end(self, key: int, done: "Future[Any]") -> None:
        task = self._tasks.pop(key)
        self._done_at = self._clock.now()
        if task.phase != CALL and not done.cancelled() and done.exception() is not None:
            self.failed = True

    def current(self) -> tuple[Task, float] | None:
        """The task in progress and its start time. May be called from any thread."""
        tasks = list(self._tasks.values())
        return (tasks[0], max(tasks[0].submitted_at, self._done_at)) if tasks else None


class Watchdog:
    """Checks an executor and the loop around it; a thread calls `check` periodically."""

    def __init__(
        self,
        executor: WatchedExecutor,
        timeout_s: float,
        ranks: Sequence[RankHandle],
        *,
        send_status: Callable[[str], None],
        give_up: Callable[[str], None],
        dump: Callable[[Sequence[RankHandle]], None] | None = None,
    ):
        """
        Args:
            executor: the executor to check.
            timeout_s: how long a phase of a step may take.
            ranks: several ranks in processes of their own; empty if the EngineCore's process is the only rank.
            send_status: receives the cause when a step hangs, and "" when it has returned.
            give_up: receives the cause when the step does not return.
            dump: writes the stacks of all threads of `ranks`; `dump_stacks` by default.
        """
        self._executor = executor
        self._timeout_s = timeout_s
        self._ranks = tuple(ranks)
        self._send_status = send_status
        self._give_up = give_up
        self._dump = dump or dump_stacks
        self.loop_busy_since: float | None = None  # None while the loop waits
        self._reported: Task | None = None

    def check(self, now: float) -> None:
        """Report the task in progress if it exceeds its timeout."""
        task, since = self._current_task(now)
        if self._reported is not None and task != self._reported:
            if not self._executor.failed:
                log.warning("%s returned: the engine continues", _name(self._reported))
                self._send_status("")
            self._reported = None
        timeout_s = self._timeout_s if task is None or task.phase != CALL else max(self._timeout_s, CALL_TIMEOUT_S)
        if task is None or now - since <= timeout_s:
            return
        cause = self._describe(task, now - since)
        if self._reported is None:
            self._reported = task
            log.error("%s; the stacks of all threads follow", cause)
            self._dump(self._ranks)
            self._send_status(cause)
        elif now - since > GIVE_UP_AFTER * timeout_s:
            self._give_up(cause)

    def _current_task(self, now: float) -> tuple[Task | None, float]:
        since = self.loop_busy_since
        if since is not None and now - since > self._timeout_s:  # the loop itself hangs, not the executor
            return Task(LOOP, 0, since), since
        current = self._executor.current()
        return (None, now) if current is None else current

    def _describe(self, task: Task, age: float) -> str:
        limit = f"for {age:.0f} s, longer than --step-timeout {self._timeout_s:g}"
        if task.phase == CALL:
            return f"{self._hanging_rank()} hangs in {task.method}, for {age:.0f} s"
        if task.phase == LOOP:
            return f"the EngineCore's loop (process {os.getpid()}) hangs between two steps, {limit}"
        return f"{self._hanging_rank()} hangs in the {task.phase} phase of step {task.step}, {limit}"

    def _hanging_rank(self) -> str:
        """The rank that hangs, if the states of the processes show it. Ranks wait for each other, so one stops all."""
        if not self._ranks:
            return f"rank 0 (process {os.getpid()})"
        states = [rank.state for rank in self._ranks]
        # Any process may briefly wait for a disk, so that state counts only if no rank is stopped or has ended.
        for words, letters in (("stopped", "Tt"), ("ended", "ZX"), ("waiting for a device", "D")):
            for number, (rank, state) in enumerate(zip(self._ranks, states, strict=True)):
                if state and state in letters:
                    return f"rank {number} (process {rank.pid}, {words})"
        pids = ", ".join(str(rank.pid) for rank in self._ranks)
        return f"one of ranks 0 to {len(self._ranks) - 1} (processes {pids})"


def _name(task: Task) -> str:
    return task.method if task.phase == CALL else f"the {task.phase} phase of step {task.step}"


def dump_stacks(ranks: Sequence[RankHandle]) -> None:
    """Write the stacks of all threads of this process and of each rank to stderr."""
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    for rank in ranks:
        rank.dump_stacks()
