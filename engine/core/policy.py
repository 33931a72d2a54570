"""How an engine decides: V1's ways, and the older ones that a removal puts in their place.

A policy is read once, when the scheduler and the core are made: they bind the methods it names, so that no step asks.
"""

from bisect import insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from engine.config import ResolvedConfig, watermark_blocks
from engine.core.request import Request

# One step runs while the next is planned and handed over, so that a device never waits for the scheduler.
STEPS_IN_FLIGHT = 2

# When nothing waits, several steps are planned at once, as many as end within this time: a request that arrives
# meanwhile waits no longer than that. Beyond 8 steps there is hardly anything left to save.
BURST_S = 0.010
MAX_BURST = 8


@dataclass(frozen=True, slots=True)
class Policy:
    """What the removals of a configuration mean."""

    prefill_first: bool
    whole_prompts: bool
    full_state: bool
    steps_in_flight: int
    bursts: bool  # as many steps as the latency target allows, when nothing waits
    scheduler_steps: int  # V0: so many decode steps at once, whoever waits; their tokens come out together
    reserved_blocks: int
    priority: bool

    @classmethod
    def of(cls, config: ResolvedConfig) -> "Policy":
        removed = config.removals
        # Who sends all known tokens with each step must know them.
        run_ahead = not removed & {"no-run-ahead", "full-state"}
        return cls(
            prefill_first="prefill-first" in removed,
            whole_prompts="no-chunking" in removed,
            full_state="full-state" in removed,
            steps_in_flight=STEPS_IN_FLIGHT if run_ahead else 1,
            bursts=run_ahead and not config.draft_tokens,
            scheduler_steps=config.scheduler_steps,
            reserved_blocks=watermark_blocks(config.num_blocks) if "watermark" in removed else 0,
            priority=config.scheduling_policy == "priority",
        )

    def burst(self, step_s: float) -> int:
        """How many decode steps may be planned at once, given how long one takes; 0.0 while that isn't known."""
        if not self.bursts:
            return self.scheduler_steps
        return min(MAX_BURST, max(1, int(BURST_S / step_s))) if step_s > 0 else 1


class Waiting(Protocol):
    """Requests without a row, in the order of their admission."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Request]: ...

    def __getitem__(self, index: int, /) -> Request: ...

    def append(self, request: Request, /) -> None: ...

    def appendleft(self, request: Request, /) -> None:
        """Take a preempted request back."""
        ...

    def popleft(self) -> Request: ...

    def remove(self, request: Request, /) -> None: ...


class PriorityQueue:
    """Requests by priority, then by arrival; a preempted one is as early as it was."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __getitem__(self, index: int, /) -> Request:
        return self._requests[index]

    def append(self, request: Request, /) -> None:
        insort(self._requests, request, key=urgency)

    appendleft = append

    def popleft(self) -> Request:
        return self._requests.pop(0)

    def remove(self, request: Request, /) -> None:
        self._requests.remove(request)


def urgency(request: Request) -> tuple[int, float, int]:
    """The smaller, the sooner."""
    return request.message.priority, request.arrived, request.handle


def make_queue(policy: Policy) -> Waiting:
    return PriorityQueue() if policy.priority else deque()
