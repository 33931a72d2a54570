"""An asynchronous device made of the CPU, which shows mistakes that a real one would hide or answer by a crash.

- Its tensors may meet only each other; host tensors that reach them, and operations that would wait for a device, are
  refused.
- Copies to the host arrive when the test lets them.
- Arrays of a step are garbage once the next step is put.
- Captured steps are replayed without their Python code (see `tests.engine.worker.tape`).
- It is out of memory when the test says so.
"""

import datetime
import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from engine.model.runtime.rank_group import RankGroup
from engine.worker.device import Columns, DeviceMemory
from engine.worker.gloo_group import GlooGroup
from engine.worker.torch_device import StagedColumns
from tests.engine.worker.tape import Tape
from tests.engine.worker.tape import current as tape_of_thread

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.unique_dim.default,
    aten._unique2.default,
}
HOST_READS = {torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.__array__}
GARBAGE = 0xA5  # bytes: as int32 an index far out of bounds
STEP_S = 2e-3  # of every step, so that a core submits bursts
LONGEST_STEP_S = 5.0  # to enqueue, with interpreted kernels on a busy machine
MOST_REFERENCES = 50_000
STAGING_BYTES = 1 << 20


class Worlds:
    """Which storages are the device's."""

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}

    def add(self, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor) and not self.has(tensor):
                # A weak reference keeps the address from being given to another storage.
                reference = StorageWeakRef(tensor.untyped_storage())
                self._storages[reference.cdata] = reference
        if len(self._storages) > MOST_REFERENCES:
            self._storages = {at: one for at, one in self._storages.items() if not one.expired()}

    def has(self, tensor: Tensor) -> bool:
        return self.has_storage(tensor.untyped_storage()._cdata)

    def has_storage(self, storage: int) -> bool:
        return storage in self._storages


class _Operations(TorchDispatchMode):
    """Refuses operations on tensors of both worlds, and those that would wait."""

    def __init__(self, worlds: Worlds, device: "StandInDevice"):
        super().__init__()
        self._worlds = worlds
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors(args) + _tensors(kwargs.values())
        inside = [self._worlds.has(tensor) for tensor in tensors]
        if any(inside):
            if not all(there or tensor.ndim == 0 for there, tensor in zip(inside, tensors, strict=True)):
                shapes = [tuple(tensor.shape) for tensor in tensors]
                raise RuntimeError(f"{func} mixes tensors of device and host: {shapes}, on the device: {inside}")
            if func in WAITS or (func is aten.index.Tensor and any(one.dtype == torch.bool for one in tensors[1:])):
                raise RuntimeError(f"{func} waits for the device")
            self._device.allocate(func)
        result = func(*args, **kwargs)
        if any(inside):
            self._worlds.add(_tensors((result,)))
        return result


class _Functions(TorchFunctionMode):
    """Tensors that are made with a device are the device's; reads by the host are refused."""

    def __init__(self, worlds: Worlds):
        super().__init__()
        self._worlds = worlds

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HOST_READS and self._worlds.has(args[0]):
            raise RuntimeError(f"{func.__name__} reads a tensor of the device")
        if not kwargs:
            return func(*args)
        result = func(*args, **kwargs)
        # Host code says "cpu", what runs on the device takes the device of a tensor.
        if isinstance(kwargs.get("device"), torch.device) and not _tensors(args):
            self._worlds.add((result,))
        return result


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments or results, and in lists of them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


class _LateCopy:
    """Implements `engine.worker.device.Fetched`."""

    def __init__(self, device: "StandInDevice", tensor: Tensor):
        self._device = device
        self._tensor = tensor
        self._fetches = device.fetches
        self._puts = device.puts
        self._due = time.monotonic() + device.delay_s

    def ready(self) -> bool:
        device, late = self._device, time.monotonic() - self._due
        overtaken = device.fetches > self._fetches
        # A step that is being enqueued will overtake it, if it samples.
        due = late > LONGEST_STEP_S or (late > 0 and device.puts == self._puts)
        return (overtaken or due) and device.gate.is_set()

    def wait(self) -> Tensor:
        assert self._device.gate.wait(30), "the test let no result through"
        while not self.ready():
            time.sleep(1e-3)
        if self._device.failure is not None:
            raise self._device.failure
        return self._tensor


class _Bands:
    """Implements `engine.model.checkpoints.weight_memory.WeightMemory`; a band is garbage once the next is taken."""

    def __init__(self, device: "StandInDevice"):
        self._device = device
        self._band = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._device.zeros(shape, dtype).fill_(math.nan)

    def band(self, nbytes: int) -> Tensor:
        self._band.fill_(GARBAGE)
        self._band = torch.empty(nbytes, dtype=torch.uint8)
        return self._band

    def load(self, target: Tensor, values: Tensor) -> None:
        has = self._device.has
        assert has(target), "weights are loaded into a host tensor"
        assert not has(values), "weights are loaded from the device"
        with _disable_current_modes():
            target.copy_(values)


class TapedGroup(GlooGroup):
    """A group whose collectives are recorded in captured steps."""

    timeout = datetime.timedelta(minutes=1)  # so that the error of one rank is reported before its test times out

    def all_reduce(self, tensor: Tensor) -> Tensor:
        tape, run = tape_of_thread(), super().all_reduce
        return run(tensor) if tape is None else tape.exchange(run, tensor)

    def all_gather(self, tensor: Tensor) -> Tensor:
        tape, run = tape_of_thread(), super().all_gather
        return run(tensor) if tape is None else tape.exchange(run, tensor)


class StandInDevice:
    """Implements `engine.worker.device.Device`.

    captures: whether steps are captured. memory_facts: what `memory` returns. shortages: how many operations that
    allocate memory fail, after `spared` ones.

    A copy arrives when the next one has been enqueued, or after `delay_s` if no step has begun by then. While `gate` is
    cleared, none does. With a `failure`, `wait` raises it.
    """

    def __init__(
        self,
        delay_s: float = 0.0,
        *,
        converts_fp8: bool = False,
        captures: bool = False,
        memory_facts: DeviceMemory | None = None,
    ):
        self.converts_fp8 = converts_fp8
        self.delay_s = delay_s
        self.captures = captures
        self.memory_facts = memory_facts
        self.shortages = 0
        self.spared = 0
        self.allocations = 0
        self.releases = 0
        self.replays = 0
        self.gate = threading.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.fetches = 0
        self.puts = 0
        self.masked_rows = 0
        self.most_unready = 0  # copies under way when one was enqueued, that one included
        self._worlds = Worlds()
        self._step_arrays: Tensor | None = None
        self._copies: list[_LateCopy] = []

    def bind_thread(self) -> None:
        """The checks hold in this thread only."""
        _Operations(self._worlds, self).__enter__()
        _Functions(self._worlds).__enter__()

    def place(self, tensor: Tensor) -> Tensor:
        assert not self._worlds.has(tensor), "a tensor of the device is placed on it again"
        return self._on_device(tensor.clone)

    def weight_memory(self) -> _Bands:
        return _Bands(self)

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor is the device's."""
        return self._worlds.has(tensor)

    def owns(self, storage: int) -> bool:
        """Whether a storage is the device's; `storage` is the address of its structure."""
        return self._worlds.has_storage(storage)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._on_device(lambda: torch.zeros(shape, dtype=dtype))

    def put(self, columns: Columns) -> dict[str, Tensor]:
        self.puts += 1
        staged = StagedColumns(columns)
        host = torch.empty(staged.nbytes, dtype=torch.uint8)
        staged.write(host)
        if self._step_arrays is None:
            self._step_arrays = self._on_device(lambda: torch.empty(STAGING_BYTES, dtype=torch.uint8))
        with _disable_current_modes():
            self._step_arrays.fill_(GARBAGE)
            self._step_arrays[: staged.nbytes].copy_(host)
        return staged.views(self._step_arrays[: staged.nbytes])

    def put_masks(self, columns: Columns) -> dict[str, Tensor]:
        self.masked_rows += len(columns["rows"])
        return {name: self.place(torch.tensor(values)) for name, values in columns.items()}

    def fetch(self, tensor: Tensor) -> _LateCopy:
        assert self._worlds.has(tensor), "a host tensor is fetched from the device"
        self._copies = [copy for copy in self._copies if not copy.ready()]
        self.fetches += 1
        with _disable_current_modes():
            copy = _LateCopy(self, tensor.clone())
        self._copies.append(copy)
        self.most_unready = max(self.most_unready, len(self._copies))
        return copy

    def register_host(self, memory: Tensor) -> None:
        assert not self._worlds.has(memory), "memory of the device is registered"
        self._registered = memory

    def copy(self, target: Tensor, source: Tensor) -> None:
        host, own = (source, target) if self._worlds.has(target) else (target, source)
        begin, end = self._registered.data_ptr(), self._registered.data_ptr() + self._registered.nbytes
        assert self._worlds.has(own)
        assert begin <= host.data_ptr() <= end - host.nbytes, "the host's side of a copy is not registered"
        with _disable_current_modes():
            target.copy_(source)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        with Tape() as tape:
            run()

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay

    def allocate(self, func: Any) -> None:
        """Called for each operation on tensors of the device."""
        if func._schema.is_mutable or any(one.alias_info is not None for one in func._schema.returns):
            return  # in place, or a view
        self.allocations += 1
        if self.spared:
            self.spared -= 1
        elif self.shortages:
            self.shortages -= 1
            raise torch.OutOfMemoryError("the stand-in device has no memory left")

    def memory(self) -> DeviceMemory | None:
        return self.memory_facts

    def release_memory(self) -> None:
        self.releases += 1

    def place_of(self, tensor: Tensor) -> str:
        """In place of `engine.kernels.triton.launch.place_of`."""
        return "device" if self._worlds.has(tensor) else "host"

    def clock(self) -> float:
        return time.perf_counter()

    def elapsed(self, began: float, ended: float) -> float:
        return STEP_S

    def join(self, rank: int, size: int, store: str) -> RankGroup:
        return TapedGroup(rank, size, store)

    def _on_device(self, make: Callable[[], Tensor]) -> Tensor:
        with _disable_current_modes():
            tensor = make()
        self._worlds.add([tensor])
        return tensor
