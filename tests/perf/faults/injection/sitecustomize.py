"""Makes parts of a real server fail on purpose; Python imports this by itself where it is on PYTHONPATH.

A file in the folder REDLINE_FAULTS switches a fault on; a marker in a request restricts it to that request.
"""

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(os.environ.get("REDLINE_FAULTS", "."))
MARKER = "fail on purpose"


def fail_forward(module: ModuleType) -> None:
    """Have the forward pass raise, or ask the allocator for more memory than there is."""
    forward = module.Runner.forward

    def failing(self: Any, message: bytes) -> None:
        if (FOLDER / "forward").exists():
            raise RuntimeError("the kernel returned status 719")
        if (FOLDER / "memory").exists():
            module.torch.empty(1 << 50)
        forward(self, message)

    module.Runner.forward = failing


def fail_detokenizer(module: ModuleType) -> None:
    """Have the detokenizer of requests with the stop string MARKER raise at every token."""

    class Failing(module.Detokenizer):  # type: ignore[name-defined, misc]
        def __init__(self, *arguments: Any, stop: Any = (), **more: Any):
            super().__init__(*arguments, stop=stop, **more)
            self.fails = MARKER in stop

        def push(self, token: int) -> Any:
            if self.fails:
                raise LookupError(f"no text for token {token}")
            return super().push(token)

    module.Detokenizer = Failing


def fail_request(module: ModuleType) -> None:
    """Have the core's input thread fail on requests with the cache salt MARKER."""
    hash_prompt = module.Request.hash_prompt

    def failing(self: Any, block_size: int) -> None:
        if self.message.cache_salt == MARKER:
            raise ArithmeticError("the prompt could not be hashed")
        hash_prompt(self, block_size)

    module.Request.hash_prompt = failing


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "engine.worker.runner": fail_forward,
    "engine.frontend.detokenizer": fail_detokenizer,
    "engine.core.request": fail_request,
}


class Patching(importlib.abc.Loader):
    """Loads a module as its own loader does, then patches it."""

    def __init__(self, inner: Any, patch: Callable[[ModuleType], None]):
        self._inner = inner
        self._patch = patch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._inner.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        self._patch(module)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules to patch with the finders that are there."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in PATCHES:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = Patching(spec.loader, PATCHES[name])
                return spec
        return None


if "REDLINE_FAULTS" in os.environ:
    sys.meta_path.insert(0, Finder())
