"""The adapters that a core serves: their names, and the keys under which workers and the prefix cache know them."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from engine.core.protocols import Executor
from engine.errors import RequestError


class AdapterBook:
    """Names become keys: one that is loaded again under its old name is another, whose blocks are not shared."""

    def __init__(self, executor: Executor, in_use: Callable[[], Iterable[str]]):
        """`in_use` gives the keys of all requests that are under way."""
        self._executor = executor
        self._in_use = in_use
        self._keys: dict[str, str] = {}
        self._paths: dict[str, str] = {}
        self._loaded = 0

    def key(self, name: str) -> str | None:
        """The key of a name, "" for none; None if no such adapter is served. From any thread."""
        return self._keys.get(name) if name else ""

    def names(self) -> dict[str, str]:
        """What is served: names, and the folders that they came from."""
        return dict(self._paths)

    def load(self, name: str, path: str) -> "Future[Any]":
        """Have all ranks load an adapter; it is served from then on. RequestError if the name is taken."""
        if name in self._keys:
            raise RequestError(f"an adapter called {name!r} is served already, from {self._paths[name]}", "lora_name")
        self._loaded += 1
        key = f"{name}#{self._loaded}"
        loading = self._executor.call("load_adapter", {"key": key, "path": path})
        loading.add_done_callback(lambda done: self._serve(name, key, path, done))
        return loading

    def _serve(self, name: str, key: str, path: str, done: "Future[Any]") -> None:
        if not done.cancelled() and done.exception() is None:
            self._paths[name] = path
            self._keys[name] = key

    def unload(self, name: str) -> "Future[Any]":
        """Have all ranks forget an adapter. RequestError if there is none of that name, or requests still use it."""
        key = self._keys.get(name)
        if key is None:
            raise RequestError(f"no adapter called {name!r} is served", "lora_name")
        users = sum(one == key for one in self._in_use())
        if users:
            raise RequestError(f"{users} requests under way use {name!r}: try again when they are done", "lora_name")
        del self._keys[name], self._paths[name]
        return self._executor.call("unload_adapter", {"key": key})
