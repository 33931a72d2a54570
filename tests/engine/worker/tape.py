"""Records what a step does to tensors, and does it again without its Python code, as a CUDA graph does.

The recording owns the tensors that were made while it was recorded; others it reads and writes by address. So a replay
shows wrong values or fails where a real one would: with state that only Python code sets, with tensors that were freed
since, with memory that nothing writes (what `torch.empty` makes is filled with garbage).
"""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.empty_strided.default,
}
NAN = 0xFF  # bytes: NaN in all float dtypes, -1 in integers
_local = threading.local()


@dataclass(frozen=True, slots=True)
class _Outside:
    """A tensor that the recording doesn't own."""

    storage: StorageWeakRef
    like: Tensor  # on the meta device

    def get(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)  # type: ignore[attr-defined]
        assert storage is not None, "a captured step uses memory that was freed"
        tensor = torch.empty(0, dtype=self.like.dtype)
        tensor.set_(storage, self.like.storage_offset(), self.like.size(), self.like.stride())
        return tensor


class Tape(TorchDispatchMode):
    """Records operations of torch and launches of interpreted kernels while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        watch_launches()
        self._calls: list[Callable[[], None]] = []
        self._own: dict[int, Tensor] = {}  # one of each storage
        self._launching = False

    def __enter__(self) -> "Tape":
        _local.tape = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _local.tape = None
        super().__exit__(*error)

    def replay(self) -> None:
        with _disable_current_modes():
            for call in self._calls:
                call()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._launching:
            before = {_key(tensor) for tensor in tensors_of((args, kwargs))}
            made = [tensor for tensor in tensors_of(result) if _key(tensor) not in before]
            self._own.update((_key(tensor), tensor) for tensor in made)
            self._calls.append(_operation(func, self._hold(args), self._hold(kwargs), made))
        return result

    def launch(self, run: Callable[..., Any], executor: Any, args: Any, kwargs: Any) -> Any:
        """Run a kernel and record it."""
        held, held_by_name = self._hold(args), self._hold(kwargs)
        # By the executor, not by `run`: a test may have wrapped its call, so that threads take turns.
        self._calls.append(lambda: executor(*_given(held), **_given(held_by_name)))
        self._launching = True
        try:
            return run(executor, *args, **kwargs)
        finally:
            self._launching = False

    def exchange(self, run: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
        """Run a collective operation of ranks and record it."""
        held = self._hold(tensor)
        self._launching = True
        try:
            result = run(tensor)
        finally:
            self._launching = False
        if _key(result) == _key(tensor):
            self._calls.append(lambda: run(_given(held)))
        else:
            self._own[_key(result)] = result
            self._calls.append(lambda: result.copy_(run(_given(held))))
        return result

    def _hold(self, value: Any) -> Any:
        """The value with tensors from outside replaced by what finds them again."""
        if isinstance(value, Tensor):
            if _key(value) in self._own:
                return value
            with _disable_current_modes():
                like = torch.empty(0, dtype=value.dtype, device="meta")
                like = like.as_strided(value.size(), value.stride(), value.storage_offset())
            return _Outside(StorageWeakRef(value.untyped_storage()), like)
        if isinstance(value, list | tuple):
            return type(value)(map(self._hold, value)) if type(value) in (list, tuple) else value
        return {name: self._hold(one) for name, one in value.items()} if isinstance(value, dict) else value


def current() -> Tape | None:
    """The tape that this thread records on."""
    return getattr(_local, "tape", None)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    values: Iterable[Any] = value.values() if isinstance(value, dict) else value
    return [tensor for one in values for tensor in tensors_of(one)] if isinstance(value, list | tuple | dict) else []


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _given(value: Any) -> Any:
    if isinstance(value, _Outside):
        return value.get()
    if type(value) in (list, tuple):
        return type(value)(map(_given, value))
    return {name: _given(one) for name, one in value.items()} if isinstance(value, dict) else value


def _operation(func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        if func in EMPTY:
            for tensor in made:
                torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(NAN)
            return
        again = tensors_of(func(*_given(args), **_given(kwargs)))
        for tensor, new in zip(made, again if made else (), strict=True):
            tensor.copy_(new)

    return run


def watch_launches() -> None:
    """Let tapes record launches of interpreted kernels, in all threads, from now on."""
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__
    if getattr(run, "is_watched", False):
        return

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        tape = current()
        return run(self, *args, **kwargs) if tape is None else tape.launch(run, self, args, kwargs)

    call.is_watched = True  # type: ignore[attr-defined]
    GridExecutor.__call__ = call
