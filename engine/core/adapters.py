"""The adapters that a core serves: their names, and the keys that identify them in workers and in the prefix cache.

A name is resolved twice: on the input thread, whose key enters the hashes of the prompt, and again on the loop, which
alone loads, unloads and counts users. A request that follows an unload in the inbox is therefore not served with the
unloaded adapter.

Several replicas unload in two steps, so that all of them do or none: `hold` makes new requests for the name wait. Then
`unload` follows, or `cancel_hold` if another replica still uses the adapter.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from engine.core.intake import TextRequest
from engine.core.protocols import Executor
from engine.core.request import Request
from engine.errors import RequestError

HOLD_S = 30.0  # a hold ends after this time, since the front end that requested it may have ended

Arrival = Request | TextRequest


@dataclass(frozen=True, slots=True)
class _Served:
    key: str
    path: str


class AdapterRegistry:
    """Maps names to keys. Loading a name again gives it a new key, so that cached blocks aren't shared.

    `requests` are all requests of the scheduler, by handle.
    """

    def __init__(self, executor: Executor, requests: Mapping[int, Request], now: Callable[[], float]):
        self._executor = executor
        self._requests = requests
        self._now = now
        self._served: dict[str, _Served] = {}
        self._loading: set[str] = set()
        self._num_loads = 0
        self._held: dict[str, float] = {}  # by name, when the hold ends
        self._parked: list[Arrival] = []

    def key(self, name: str) -> str | None:
        """The key of an adapter; "" for no adapter, None if the name isn't served. May be called from any thread."""
        if not name:
            return ""
        served = self._served.get(name)
        return None if served is None else served.key

    def names(self) -> dict[str, str]:
        """Names and folders of all served adapters."""
        return {name: served.path for name, served in list(self._served.items())}

    def load(self, name: str, path: str) -> "Future[Any]":
        """Load an adapter on all ranks, then serve it; resolves once it is served.

        Raises RequestError if the name is taken.
        """
        if name in self._loading:  # checked first: an adapter is served before it is removed from _loading
            raise RequestError(f"an adapter called {name!r} is being loaded already", "lora_name")
        if name in self._served:
            raise RequestError(
                f"an adapter called {name!r} is served already, from {self._served[name].path}", "lora_name"
            )
        self._num_loads += 1
        key = f"{name}#{self._num_loads}"
        self._loading.add(name)
        try:
            loading = self._executor.call("load_adapter", {"key": key, "path": path})
        except BaseException:
            self._loading.discard(name)
            raise
        # A future of its own: who waits for the executor's may continue before its callbacks have run.
        served: Future[Any] = Future()
        loading.add_done_callback(lambda done: self._finish_load(name, _Served(key, path), done, served))
        return served

    def _finish_load(self, name: str, loaded: _Served, done: "Future[Any]", served: "Future[Any]") -> None:
        if done.cancelled():
            self._loading.discard(name)
            served.cancel()
        elif (error := done.exception()) is not None:
            self._loading.discard(name)
            served.set_exception(error)
        else:
            self._served[name] = loaded
            self._loading.discard(name)
            served.set_result(done.result())

    def unload(self, name: str) -> "Future[Any]":
        """Unload an adapter on all ranks. Raises RequestError if no adapter has the name, or requests still use it."""
        key = self._unused_key(name)
        del self._served[name]
        self._held.pop(name, None)
        return self._executor.call("unload_adapter", {"key": key})

    def _unused_key(self, name: str) -> str:
        """The key of an adapter that no request uses. Raises RequestError if requests use it, or it isn't served."""
        key = self.key(name)
        if not key:
            if name in self._loading:
                raise RequestError(f"the adapter {name!r} is still being loaded: try again later", "lora_name")
            raise RequestError(f"no adapter called {name!r} is served", "lora_name")
        users = sum(request.adapter == key for request in self._requests.values())
        if users:
            raise RequestError(f"{users} request(s) still use {name!r}: try again when they are done", "lora_name")
        return key

    # ------------------------------------------------------------------------------------------------------------ hold

    def hold(self, name: str) -> None:
        """Make new requests for the adapter wait until `unload` or `cancel_hold`, at most HOLD_S.

        `unload` then succeeds. Raises RequestError if the adapter can't be unloaded.
        """
        self._unused_key(name)
        if self._held.get(name, 0.0) > self._now():
            raise RequestError(f"the adapter {name!r} is being unloaded already", "lora_name")
        self._held[name] = self._now() + HOLD_S

    def cancel_hold(self, name: str) -> None:
        """The adapter stays; the requests that wait for it continue."""
        self._held.pop(name, None)

    @property
    def has_parked(self) -> bool:
        return bool(self._parked)

    @property
    def parked(self) -> list[int]:
        """The handles of all requests that wait for a hold to end."""
        return [one.handle for one in self._parked]

    def park(self, arrival: Arrival) -> bool:
        """Make a request wait if its adapter is held; returns whether it is."""
        if not self._held or arrival.message.adapter not in self._held:
            return False
        self._parked.append(arrival)
        return True

    def unpark(self, handle: int) -> bool:
        """Drop a parked request; False if there is none."""
        before = len(self._parked)
        self._parked = [one for one in self._parked if one.handle != handle]
        return len(self._parked) < before

    def take_released(self, now: float) -> list[Arrival]:
        """Remove and return the parked requests whose hold has ended."""
        self._held = {name: until for name, until in self._held.items() if until > now}
        released = [one for one in self._parked if one.message.adapter not in self._held]
        self._parked = [one for one in self._parked if one.message.adapter in self._held]
        return released

    def next_release(self) -> float | None:
        """When the first parked request is released at the latest."""
        return min(self._held.values(), default=None) if self._parked else None
