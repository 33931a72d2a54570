"""Requests without a slot, in the order of their admission."""

from bisect import insort
from collections.abc import Iterator
from typing import Protocol

from engine.core.request import Request


class WaitingQueue(Protocol):
    """A deque is one, in order of arrival."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Request]: ...

    def __getitem__(self, index: int, /) -> Request: ...

    def append(self, request: Request, /) -> None: ...

    def appendleft(self, request: Request, /) -> None:
        """Put a preempted request back."""
        ...

    def popleft(self) -> Request: ...

    def remove(self, request: Request, /) -> None: ...


class PriorityQueue:
    """Requests by priority, then by arrival; a preempted one returns to its place."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __getitem__(self, index: int, /) -> Request:
        return self._requests[index]

    def append(self, request: Request, /) -> None:
        insort(self._requests, request, key=priority_key)

    appendleft = append

    def popleft(self) -> Request:
        return self._requests.pop(0)

    def remove(self, request: Request, /) -> None:
        self._requests.remove(request)


def priority_key(request: Request) -> tuple[int, float, int]:
    """Lower keys are admitted first and preempted last."""
    return request.message.priority, request.arrived, request.handle
