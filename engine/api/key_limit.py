"""A limit on the requests that an API key may have at once, over all API processes of a server."""

from starlette.types import ASGIApp, Receive, Scope, Send

from engine.api.access import KEY
from engine.api.error_responses import ApiError
from engine.api.limits import retry_after_s
from engine.frontend.connect import EngineClient
from engine.frontend.front_end_stats import shared_cells

CELL = 8  # bytes


class KeyLoads:
    """The requests that each API key has at once, in memory that the API processes of a server share.

    Each process counts in a row of its own. Two processes that admit at the same moment may exceed a limit by one.
    """

    def __init__(self, processes: int, keys: int, descriptor: int | None = None):
        """`descriptor` is that of counts made by another process; None makes them."""
        self.descriptor, cells = shared_cells(processes * keys * CELL, descriptor)
        counts = cells.cast("q")
        self._rows = [counts[number * keys : (number + 1) * keys] for number in range(processes)]

    def total(self, key: int) -> int:
        """The requests of a key, by its number, in all processes."""
        return sum(row[key] for row in self._rows)

    def add(self, process: int, key: int, count: int) -> None:
        self._rows[process][key] += count

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
        if self._loads.total(key) >= self._limit:
            await self._refusal().response()(scope, receive, send)
            return
        self._loads.add(self._process, key, 1)
        try:
            await self._app(scope, receive, send)
        finally:
            self._loads.add(self._process, key, -1)

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
