"""The adapters that a core serves: their names, and the keys under which workers and the prefix cache know them.

A name is resolved twice: on the input thread, whose key goes into the prompt's hashes, and again on the loop, which
alone loads, unloads and counts users. So what stands behind an unload in the inbox isn't served with what that took.

Several replicas unload in two steps, so that either all do or none: `hold` keeps what arrives for the name back, then
`unload` or, where another replica still needs it, `keep`.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from engine.core.intake import TextRequest
from engine.core.protocols import Executor
from engine.core.request import Request
from engine.errors import RequestError

HOLD_S = 30.0  # a front end that asked to hold an adapter back and says no more has ended

Arrival = Request | TextRequest


@dataclass(frozen=True, slots=True)
class _Served:
    key: str
    path: str


class AdapterBook:
    """Names become keys: one that is loaded again under its old name is another, whose blocks are not shared."""

    def __init__(self, executor: Executor, in_use: Callable[[], Iterable[str]], now: Callable[[], float]):
        """`in_use` gives the keys of all requests that are under way."""
        self._executor = executor
        self._in_use = in_use
        self._now = now
        self._served: dict[str, _Served] = {}
        self._loading: set[str] = set()
        self._loaded = 0
        self._held: dict[str, float] = {}  # names held back, until when
        self._parked: list[Arrival] = []

    def key(self, name: str) -> str | None:
        """The key of a name, "" for none; None if no such adapter is served. From any thread."""
        if not name:
            return ""
        served = self._served.get(name)
        return None if served is None else served.key

    def names(self) -> dict[str, str]:
        """What is served: names, and the folders that they came from."""
        return {name: served.path for name, served in list(self._served.items())}

    def load(self, name: str, path: str) -> "Future[Any]":
        """Have all ranks load an adapter; it is served from then on. RequestError if the name is taken."""
        if name in self._loading:  # looked at first: it is served before it stops to be loaded
            raise RequestError(f"an adapter called {name!r} is being loaded already", "lora_name")
        if name in self._served:
            raise RequestError(
                f"an adapter called {name!r} is served already, from {self._served[name].path}", "lora_name"
            )
        self._loaded += 1
        key = f"{name}#{self._loaded}"
        self._loading.add(name)
        try:
            loading = self._executor.call("load_adapter", {"key": key, "path": path})
        except BaseException:
            self._loading.discard(name)
            raise
        loading.add_done_callback(lambda done: self._serve(name, key, path, done))
        return loading

    def _serve(self, name: str, key: str, path: str, done: "Future[Any]") -> None:
        if not done.cancelled() and done.exception() is None:
            self._served[name] = _Served(key, path)
        self._loading.discard(name)

    def unload(self, name: str) -> "Future[Any]":
        """Have all ranks forget an adapter. RequestError if there is none of that name, or requests still use it."""
        key = self._unused(name)
        del self._served[name]
        self._held.pop(name, None)
        return self._executor.call("unload_adapter", {"key": key})

    def _unused(self, name: str) -> str:
        """The key of an adapter that no request uses; RequestError otherwise."""
        key = self.key(name)
        if not key:
            if name in self._loading:
                raise RequestError(f"the adapter {name!r} is still being loaded: try again when it is", "lora_name")
            raise RequestError(f"no adapter called {name!r} is served", "lora_name")
        users = sum(one == key for one in self._in_use())
        if users:
            raise RequestError(f"{users} requests under way use {name!r}: try again when they are done", "lora_name")
        return key

    # ------------------------------------------------------------------------------------------------- held back

    def hold(self, name: str) -> None:
        """Promise that `unload` can follow; requests for the adapter wait until then, `keep`, or HOLD_S.

        RequestError if it can't.
        """
        self._unused(name)
        if self._held.get(name, 0.0) > self._now():
            raise RequestError(f"the adapter {name!r} is being unloaded already", "lora_name")
        self._held[name] = self._now() + HOLD_S

    def keep(self, name: str) -> None:
        """Take `hold` back."""
        self._held.pop(name, None)

    @property
    def holds_requests(self) -> bool:
        return bool(self._parked)

    @property
    def parked(self) -> list[int]:
        """The handles of all requests put aside."""
        return [one.handle for one in self._parked]

    def park(self, arrival: Arrival) -> bool:
        """Put a request aside if its adapter is held back."""
        if not self._held or arrival.message.adapter not in self._held:
            return False
        self._parked.append(arrival)
        return True

    def unpark(self, handle: int) -> bool:
        """Forget a request that was put aside; False if there is none."""
        before = len(self._parked)
        self._parked = [one for one in self._parked if one.handle != handle]
        return len(self._parked) < before

    def released(self, now: float) -> list[Arrival]:
        """Take the requests that needn't wait any longer."""
        self._held = {name: until for name, until in self._held.items() if until > now}
        free = [one for one in self._parked if one.message.adapter not in self._held]
        self._parked = [one for one in self._parked if one.message.adapter in self._held]
        return free

    def next_release(self) -> float | None:
        """When the first of what is put aside is released at the latest."""
        return min(self._held.values(), default=None) if self._parked else None
