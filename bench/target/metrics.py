"""The server's Prometheus metrics, read in a background thread during a load point."""

import threading
import time
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from typing import Protocol, Self
from urllib.parse import urlsplit

import httpx

from bench.results import ServerState as ServerState
from bench.target.control import ControlClient
from bench.target.target import Target

SCRAPE_EVERY_S = 0.5

# Field of ServerState -> names in order of preference. Whether counters end in _total depends on the version of the
# server's Prometheus library; "gpu_" names are those of older vLLM.
_NAMES: dict[str, tuple[str, ...]] = {
    "running": ("vllm:num_requests_running", "sglang:num_running_reqs"),
    "waiting": ("vllm:num_requests_waiting", "sglang:num_queue_reqs"),
    "kv_use": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage"),
    "preemptions": (
        "vllm:num_preemptions_total",
        "vllm:num_preemptions",
        "sglang:num_retracted_requests_total",
        "sglang:num_retracted_reqs_total",
    ),
    "retracted_now": ("sglang:num_retracted_reqs",),
    "prefix_queries": (
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_queries",
        "vllm:gpu_prefix_cache_queries_total",
        "vllm:gpu_prefix_cache_queries",
        "sglang:prompt_tokens_total",
    ),
    "prefix_hits": (
        "vllm:prefix_cache_hits_total",
        "vllm:prefix_cache_hits",
        "vllm:gpu_prefix_cache_hits_total",
        "vllm:gpu_prefix_cache_hits",
        "sglang:cached_tokens_total",
    ),
}
_WANTED = {name for names in _NAMES.values() for name in names}


def parse_metrics(text: str, at_s: float) -> ServerState:
    """Read a Prometheus text page; unknown lines are skipped."""
    seen: dict[str, list[float]] = {}
    for line in text.splitlines():
        name = line.partition("{")[0].split(" ", 1)[0]
        if name not in _WANTED:
            continue
        # The value and an optional timestamp follow the labels, whose values may contain spaces and braces.
        rest = line[line.rindex("}") + 1 :] if "{" in line else line[len(name) :]
        try:
            value = float(rest.split()[0])
        except (IndexError, ValueError):
            continue
        seen.setdefault(name, []).append(value)
    found: dict[str, float] = {}
    for field, names in _NAMES.items():
        values = next((seen[name] for name in names if name in seen), None)
        if values is not None:
            found[field] = max(values) if field == "kv_use" else sum(values)
    return ServerState(at_s=at_s, **found)


@dataclass(frozen=True, slots=True)
class WindowState:
    """The readings reduced to one window; None if the server has no such metric."""

    preemptions: int | None = None
    prefix_hit_rate: float | None = None
    kv_use_max: float | None = None
    waiting_max: int | None = None
    running_max: int | None = None
    slots_full: bool = False  # requests waited while the number of running requests stayed at its maximum


def window_state(states: list[ServerState], start_s: float, end_s: float) -> WindowState:
    """Reduce readings, sorted by time, to the window; counters are differences of the readings around it."""
    if not states:
        return WindowState()
    times = [s.at_s for s in states]
    first = max(0, bisect_right(times, start_s) - 1)
    last = min(len(states) - 1, bisect_left(times, end_s))
    inside = states[first : max(first, last) + 1]
    waiting = [s.waiting for s in inside if s.waiting is not None]
    running = [s.running for s in inside if s.running is not None]
    return WindowState(
        preemptions=_preemptions(inside),
        prefix_hit_rate=_hit_rate(inside[0], inside[-1]),
        kv_use_max=max((s.kv_use for s in inside if s.kv_use is not None), default=None),
        waiting_max=int(max(waiting)) if waiting else None,
        running_max=int(max(running)) if running else None,
        slots_full=_slots_full(inside),
    )


def _preemptions(states: list[ServerState]) -> int | None:
    before, after = states[0].preemptions, states[-1].preemptions
    if before is not None and after is not None:
        return max(0, int(after - before))
    gauge = [s.retracted_now for s in states if s.retracted_now is not None]
    return int(max(gauge)) if gauge else None


def _hit_rate(before: ServerState, after: ServerState) -> float | None:
    counters = (before.prefix_queries, before.prefix_hits, after.prefix_queries, after.prefix_hits)
    if any(c is None for c in counters):
        return None
    queries_before, hits_before, queries_after, hits_after = (c for c in counters if c is not None)
    queries = queries_after - queries_before
    return (hits_after - hits_before) / queries if queries > 0 else None


def _slots_full(states: list[ServerState]) -> bool:
    queued = [s for s in states if s.waiting and s.running is not None]
    if len(queued) < 3 or 2 * len(queued) < len(states):
        return False
    running = sorted(s.running for s in queued if s.running is not None)
    top = running[-1]
    # A reading between the end of one request and the start of the next is lower, so a few of these are normal.
    return running[len(running) // 4] >= 0.95 * top and sum(r == top for r in running) * 2 >= len(running)


class StateReader(Protocol):
    """Reads the counters of a server during load points, as a context manager."""

    states: list[ServerState]  # since `clear()`, by time
    started_at: float  # time 0 of the load point, on the clock of the readings
    failures: int  # consecutive readings without a response
    available: bool  # whether the server has such counters

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def read(self) -> ServerState | None:
        """Take one reading now; None if the server does not give one."""
        ...

    @property
    def latest(self) -> ServerState | None: ...

    def clear(self) -> None:
        """Drop all readings but the last one, before a load point."""
        ...

    def readings(self) -> list[ServerState]:
        """The readings since `clear()`, with times since `started_at`."""
        ...

    def healthy(self) -> bool:
        """Whether the server still answers."""
        ...


class Readings:
    """The readings of a reader."""

    def __init__(self) -> None:
        self.states: list[ServerState] = []
        self.started_at = 0.0
        self.failures = 0
        self.available = True

    @property
    def latest(self) -> ServerState | None:
        return self.states[-1] if self.states else None

    def clear(self) -> None:
        del self.states[:-1]

    def readings(self) -> list[ServerState]:
        return [replace(state, at_s=state.at_s - self.started_at) for state in list(self.states)]


class MetricsReader(Readings):
    """Reads a target's /metrics twice a second in a thread and appends the readings to `states`.

    If the target has a base path without such a page, the page at the root of the server is read.
    """

    def __init__(self, server: Target | str, every_s: float = SCRAPE_EVERY_S):
        super().__init__()
        target = Target.of(server)
        self._client = ControlClient(target, timeout_s=5.0)
        root = "{}://{}".format(*urlsplit(target.base_url)[:2])
        self._pages = ["/metrics"] + ([f"{root}/metrics"] if root != target.base_url else [])
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "MetricsReader":
        self.read()
        if self.available:
            self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
        self._client.close()

    def read(self) -> ServerState | None:
        """Take one reading now; None if the server does not give one."""
        before = time.monotonic()
        try:
            response = self._client.get(self._pages[0])
            while response.status_code != 200 and len(self._pages) > 1:
                del self._pages[0]
                response = self._client.get(self._pages[0])
        except httpx.HTTPError:
            self.failures += 1
            return None
        self.failures = 0
        if response.status_code != 200:
            self.available = False
            return None
        state = parse_metrics(response.text, (before + time.monotonic()) / 2)
        self.available = state.running is not None or state.waiting is not None or state.preemptions is not None
        if not self.available:
            return None
        self.states.append(state)
        return state

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self.read()

    def healthy(self) -> bool:
        """Whether GET /health responds with 200, or GET /v1/models with a status below 500."""
        for path, highest in (("/health", 200), ("/v1/models", 499)):  # a server without /v1/models responds with 404
            try:
                if self._client.get(path).status_code <= highest:
                    return True
            except httpx.HTTPError:
                continue
        return False
