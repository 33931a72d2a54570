"""A GPU that torch drives as `cuda`: NVIDIA's, and AMD's with ROCm. No other file of the engine names torch.cuda.

All work is enqueued on one stream by one thread, in this order for each step: copy of the step's arrays, kernels, copy
of its tokens to the host. So no buffer on the device needs a second one: what overwrites it comes later in the stream.
Only the host's side of a copy is shared with a step in progress; its buffers are used in turns. The copy of a step's
tokens, about a kilobyte, is in the same stream as well: on a second stream it would need an event to keep the next step
from overwriting the tokens first, which costs as much as the copy.
"""

import atexit
import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.model.runtime.rank_group import RankGroup
from engine.text import human_bytes
from engine.worker.device import Columns, DeviceMemory
from engine.worker.nccl_group import NcclGroup
from engine.worker.torch_device import StagedColumns

STAGING_BUFFERS = 3  # two steps in flight, and the one being laid out
WARM_UP_RUNS = 2  # before a capture: libraries allocate their workspaces in the first


class _PinnedCopy:
    """Implements `engine.worker.device.Fetched`."""

    def __init__(self, tensor: Tensor):
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record()

    def ready(self) -> bool:
        return bool(self._done.query())

    def wait(self) -> Tensor:
        self._done.synchronize()
        return self._host


class _Staging:
    """Buffers for the arrays of steps: pinned ones in turns, and their place on the device."""

    def __init__(self, nbytes: int, device: torch.device):
        self.nbytes = nbytes
        self._pinned = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(STAGING_BUFFERS)]
        self._copied = [torch.cuda.Event() for _ in range(STAGING_BUFFERS)]
        self._on_device = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._turn = 0

    def put(self, staged: StagedColumns) -> Tensor:
        turn, self._turn = self._turn, (self._turn + 1) % STAGING_BUFFERS
        self._copied[turn].synchronize()
        host, on_device = self._pinned[turn][: staged.nbytes], self._on_device[: staged.nbytes]
        staged.write(host)
        on_device.copy_(host, non_blocking=True)
        self._copied[turn].record()
        return on_device


class _Stagings:
    """Buffers of one purpose, by size."""

    def __init__(self, nbytes: int, device: torch.device):
        """`nbytes`: of the first ones."""
        self._nbytes = nbytes
        self._device = device
        self._sizes: list[_Staging] = []

    def put(self, columns: Columns) -> dict[str, Tensor]:
        staged = StagedColumns(columns)
        staging = next((one for one in self._sizes if one.nbytes >= staged.nbytes), None)
        if staging is None:
            nbytes = self._nbytes
            while nbytes < staged.nbytes:
                nbytes *= 2
            staging = _Staging(nbytes, self._device)
            self._sizes.append(staging)
        return staged.views(staging.put(staged))


class _PinnedBand:
    """Pinned memory, and the event after which its last copy is complete."""

    def __init__(self, nbytes: int):
        self.memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self.copied = torch.cuda.Event()


class PinnedBands:
    """Implements `engine.model.checkpoints.weight_memory.WeightMemory`: a file is read while the last band is copied.

    Values that are not in the band, or not contiguous there, or of another dtype are copied from memory that is not
    pinned, which CUDA reads before the call returns.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._buffers: list[_PinnedBand | None] = [None, None]
        self._turn = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def band(self, nbytes: int) -> Tensor:
        self._turn = 1 - self._turn
        buffer = self._buffers[self._turn]
        if buffer is not None:
            buffer.copied.synchronize()
        if buffer is None or len(buffer.memory) < nbytes:
            buffer = self._buffers[self._turn] = _PinnedBand(nbytes)
        return buffer.memory[:nbytes]

    def load(self, target: Tensor, values: Tensor) -> None:
        target.copy_(values, non_blocking=True)
        buffer = self._buffers[self._turn]
        if buffer is not None:
            buffer.copied.record()


class CudaDevice:
    """Implements `engine.worker.device.Device`.

    Args:
        index: of the GPU among those that are visible to the process.
        staging_bytes: of a step's arrays. Larger steps have buffers of their own, at other addresses.
    """

    captures = True

    def __init__(self, index: int = 0, staging_bytes: int = 1 << 20):
        self.device = torch.device("cuda", index)
        self._steps = _Stagings(staging_bytes, self.device)
        self._masks = _Stagings(staging_bytes, self.device)
        self._pool: Any = None  # of the graphs
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    @property
    def converts_fp8(self) -> bool:
        return torch.version.hip is None and torch.cuda.get_device_capability(self.device) >= (8, 9)

    def bind_thread(self) -> None:
        """Make the GPU and a stream of its own the thread's. A graph can't be captured on the default stream."""
        torch.cuda.set_device(self.device)
        torch.cuda.set_stream(torch.cuda.Stream(self.device))

    def place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def weight_memory(self) -> PinnedBands:
        return PinnedBands(self.device)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def put(self, columns: Columns) -> dict[str, Tensor]:
        return self._steps.put(columns)

    def put_masks(self, columns: Columns) -> dict[str, Tensor]:
        return self._masks.put(columns)

    def fetch(self, tensor: Tensor) -> _PinnedCopy:
        return _PinnedCopy(tensor)

    def register_host(self, memory: Tensor) -> None:
        """Pin it, so that copies don't wait. Raises ConfigError if the driver refuses."""
        error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        if int(error):
            raise ConfigError(
                f"--kv-spill: {human_bytes(memory.nbytes)} of host memory can't be pinned ({error}): lower host=, or "
                "raise the limit of locked memory (ulimit -l)"
            )

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record `run` in a CUDA graph. All graphs share one memory pool, so the largest must be captured first.

        `torch.cuda.graph` is not used: it would collect garbage and empty the allocator's cache for each graph.
        """
        for _ in range(WARM_UP_RUNS):
            run()
        graph = torch.cuda.CUDAGraph()
        if not self._graphs:  # a pool whose graphs are gone can't be used again
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.current_stream().synchronize()
        # No garbage collection meanwhile: it could free what may not be freed during a capture. Other threads only wait
        # for events, which a capture of this thread alone allows.
        gc.disable()
        try:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            except Exception:
                with contextlib.suppress(RuntimeError):  # that the capture is invalid
                    graph.capture_end()
                raise
            graph.capture_end()
        finally:
            gc.enable()
        self._graphs.add(graph)
        return graph.replay

    def memory(self) -> DeviceMemory:
        torch.cuda.synchronize(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        used, peak = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        return DeviceMemory(total, free, used, peak)

    def release_memory(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def clock(self) -> torch.cuda.Event:
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def elapsed(self, began: torch.cuda.Event, ended: torch.cuda.Event) -> float:
        ended.synchronize()
        return float(began.elapsed_time(ended)) * 1e-3

    def join(self, rank: int, size: int, store: str) -> RankGroup:
        torch.cuda.set_device(self.device)
        group = NcclGroup(rank, size, store, self.device)
        atexit.register(group.close)
        return group
