"""An engine on simulated hardware in virtual time: the real core, without processes, sockets, threads or waiting."""

from collections.abc import Callable

from engine.core.engine import EngineCore
from engine.hardware.executor import SimulatedExecutor
from engine.resolved_config import ResolvedConfig


class VirtualClock:
    """Implements `engine.clock.Clock`; time passes when `move_to` is called."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def move_to(self, time: float) -> None:
        if time < self._now:
            raise ValueError(f"time can't go back by {self._now - time} s")
        self._now = time


class VirtualEngine:
    """One replica. `send(front_end, message)` takes an encoded FromCore, within `turn`."""

    def __init__(
        self,
        config: ResolvedConfig,
        executor: SimulatedExecutor,
        clock: VirtualClock,
        send: Callable[[int, bytes], None],
    ):
        self.core = EngineCore(config, executor, clock, send)
        self._executor, self._clock = executor, clock

    def turn(self) -> None:
        """Do everything that happens at this moment."""
        now = self._clock.now()
        self._executor.pump()
        while self.core.step(now) and self._executor.pump():
            pass

    @property
    def next_event(self) -> float | None:
        """When something will happen by itself, not before now; None: never."""
        now = self._clock.now()
        due, wait = self._executor.next_due, self.core.next_deadline(now)
        if wait is None:
            return due
        return now + wait if due is None else min(due, now + wait)
