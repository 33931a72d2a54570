"""The inputs that steps in flight encode, and the requests that are computed with their embeddings.

The result of a step says which of its inputs could not be encoded. By then later steps may have been scheduled that
use the embeddings, or KV that was computed with them. Example: step 5 encodes A for request 1, and step 6 is scheduled
before the result of step 5 arrives:

    step 5    request 1 computes A                   users of A: 1
    step 6    request 2 computes A too               users of A: 1, 2
              request 3 has a prefix hit with A      users of A: 1, 2, 3
    result 5  A could not be encoded: requests 1 to 3 end, and their blocks from A on leave the prefix cache
              A was encoded: it has no users any longer
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from engine.core.hashing import joint_range
from engine.core.request import Request


@dataclass(slots=True)
class _Step:
    """contents: hashes of what it encodes, in order. users: by hash and handle, the requests that depend on it."""

    contents: list[bytes] = field(default_factory=list)
    users: dict[bytes, dict[int, Request]] = field(default_factory=dict)


class UnconfirmedInputs:
    """Inputs by the hash of their content, and what depends on them."""

    def __init__(self) -> None:
        self._steps: deque[_Step] = deque()  # those that encode inputs and have not returned, oldest first
        self._is_scheduled = True  # the newest of them; False: inputs are still added to it

    def add(self, content: bytes) -> None:
        """The step that is being scheduled encodes an input."""
        if self._is_scheduled:
            self._steps.append(_Step())
            self._is_scheduled = False
        self._steps[-1].contents.append(content)
        self._steps[-1].users.setdefault(content, {})

    def end_step(self) -> None:
        """A step was scheduled."""
        self._is_scheduled = True

    def use(self, request: Request, start: int, end: int) -> None:
        """A request computes tokens from `start` to `end`, or found their KV in the prefix cache."""
        for step in self._steps:
            for content, first, last in _dependent_ranges(request):
                if content in step.users and first < end and last > start:
                    step.users[content][request.handle] = request

    def leave(self, request: Request) -> int | None:
        """A request ends. Returns the first position that depends on an unconfirmed input, None if there is none."""
        used = {content for step in self._steps for content, users in step.users.items() if request.handle in users}
        for step in self._steps:
            for users in step.users.values():
                users.pop(request.handle, None)
        return next((first for content, first, _ in _dependent_ranges(request) if content in used), None)

    def failures(self, errors: Sequence[str]) -> dict[int, str]:
        """The requests that depend on inputs that could not be encoded, by handle, and why they can't be served.

        `errors` are of the inputs of the oldest step; an empty one: it was encoded.
        """
        found: dict[int, str] = {}
        oldest = self._steps[0]
        for content, error in zip(oldest.contents, errors, strict=True):
            for handle, request in oldest.users[content].items() if error else ():
                index = next(n for n, one in enumerate(request.message.mm_inputs) if one.hash == content)
                found.setdefault(handle, f"multimodal input {index} could not be encoded: {error}")
        return found

    def confirm(self) -> list[bytes]:
        """The result of the oldest step is booked; returns what it encoded."""
        return self._steps.popleft().contents


def _dependent_ranges(request: Request) -> Iterator[tuple[bytes, int, int]]:
    """Of each input, its hash, and the first token and the end of those that depend on it within the inputs."""
    mm_inputs = request.message.mm_inputs
    joint = joint_range(mm_inputs)
    for one in mm_inputs:
        yield one.hash, *(joint or (one.offset, one.offset + one.length))
