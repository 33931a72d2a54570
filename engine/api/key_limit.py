"""A limit on the requests that an API key may have at once, over all API processes of a server."""

import contextlib
import fcntl
from collections.abc import Iterator

from starlette.types import ASGIApp, Receive, Scope, Send

from engine.api.access import KEY
from engine.api.error_responses import ApiError
from engine.api.limits import retry_after_s
from engine.frontend.connect import EngineClient
from engine.frontend.front_end_stats import shared_cells

CELL = 8  # bytes


class KeyLoads:
    """The requests that each API key has at once, in memory that the API processes of a server share.

    Each process counts in a row of its own, so that the requests of one that was killed can be forgotten. A lock of the
    file makes counting and admitting one operation.
    """

    def __init__(self, processes: int, keys: int, descriptor: int | None = None):
        """`descriptor` is that of counts made by another process; None makes them."""
        self.descriptor, cells = shared_cells(processes * keys * CELL, descriptor)
        counts = cells.cast("q")
        self._rows = [counts[number * keys : (number + 1) * keys] for number in range(processes)]

    def total(self, key: int) -> int:
        """The requests of a key, by its number, in all processes."""
        return sum(row[key] for row in self._rows)

    def admit(self, process: int, key: int, limit: int) -> bool:
        """Count a request of a key in a process, unless the key has `limit` of them already."""
        with self._locked():
            if self.total(key) >= limit:
                return False
            self._rows[process][key] += 1
            return True

    def leave(self, process: int, key: int) -> None:
        """A request of a key has ended in a process."""
        self._rows[process][key] -= 1

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock between processes, for as long as it takes to add some numbers."""
        # Unlike that of flock, the lock is the process's, although descriptors are inherited.
        fcntl.lockf(self.descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self.descriptor, fcntl.LOCK_UN)

    def clear(self, process: int) -> None:
        """Forget the requests of a process that has ended."""
        row = self._rows[process]
        for key in range(len(row)):
            row[key] = 0


class LimitKeys:
    """Answers requests of a key that has too many with 429. Only POST counts: the others cost little."""

    def __init__(self, app: ASGIApp, limit: int, loads: KeyLoads, process: int, client: EngineClient):
        """`process` is the number of this API process."""
        self._app = app
        self._limit = limit
        self._loads = loads
        self._process = process
        self._client = client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key: int | None = scope.get(KEY)
        if key is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if not self._loads.admit(self._process, key, self._limit):
            await self._refusal().response(scope)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._loads.leave(self._process, key)

    def _refusal(self) -> ApiError:
        self._client.stats.count_event("key_limit")
        wait = retry_after_s(self._client.total_stats.e2e)
        return ApiError(
            429,
            f"this API key has {self._limit:,} requests running, the most allowed (--max-requests-per-key); "
            f"try again in {wait} s",
            code="too_many_requests",
            headers={"Retry-After": str(wait)},
        )
