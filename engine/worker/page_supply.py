"""Populates the pages of the KV cache ahead of their use.

The first touch of a huge page costs about 0.1 ms, and up to 5 ms on a virtual machine whose host must allocate it too.
New blocks lie on new pages in every layer at once, so a step would pay for dozens. A thread with idle priority
populates pages ahead of the highest block in use: far ahead, since a loaded server leaves no idle time, but not to the
end, so that a large cache takes memory only as it is needed.
"""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from engine.kernels.cpu.huge_pages import HUGE_PAGE

AHEAD_BYTES = 1 << 30
_POPULATE_WRITE = 23  # of madvise, since Linux 5.14: populates pages as a write would


class PageSupply:
    """Populates pages of a cache until it is closed. Without support by the system it does nothing.

    Args:
        memory: the owner of the memory; kept alive.
        address: of the first region.
        regions: keys and values of each layer, one after the other; `region_bytes` each.
        block_bytes: bytes of one block in each region.
        ahead_bytes: how far ahead of the highest block in use.
    """

    def __init__(
        self,
        memory: Any,
        address: int,
        regions: int,
        region_bytes: int,
        block_bytes: int,
        ahead_bytes: int = AHEAD_BYTES,
    ):
        self._memory = memory
        self._closed = False
        self._address = address
        self._regions = regions
        self._region_bytes = region_bytes
        self._block_bytes = block_bytes
        self._stride = max(1, HUGE_PAGE // block_bytes)  # blocks populated at a time: one page of each region
        self._ahead = max(2 * self._stride, ahead_bytes // (regions * block_bytes))  # blocks
        self._wanted = 0  # blocks
        self.supplied = 0  # blocks, from the first on, that have their pages
        self._more = threading.Event()
        self.reach(0)
        threading.Thread(target=self._supply, name="page-supply", daemon=True).start()

    def reach(self, block: int) -> None:
        """Report that blocks up to this one are in use."""
        if block + self._ahead // 2 >= self._wanted:
            most = self._region_bytes // self._block_bytes
            self._wanted = min(block + self._ahead, most)
            self._more.set()

    def close(self) -> None:
        """Ask the thread to end."""
        self._closed = True
        self._more.set()

    def _supply(self) -> None:
        if hasattr(os, "SCHED_IDLE"):
            with suppress(OSError):  # of this thread
                os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        while self._more.wait() and not self._closed:
            self._more.clear()
            while self.supplied < self._wanted:
                blocks = min(self.supplied + self._stride, self._wanted)
                for page in self._pages(self.supplied, blocks):
                    first = max(page, self._address)
                    if self._closed or madvise(first, min(page + HUGE_PAGE, self._end) - first, _POPULATE_WRITE):
                        return
                self.supplied = blocks

    def _pages(self, first: int, end: int) -> Iterator[int]:
        """Addresses of the huge pages of blocks `first` to `end`.

        One page per system call, so that another thread can take the core in between.
        """
        for region in range(self._regions):
            start = self._address + region * self._region_bytes
            yield from range(
                (start + first * self._block_bytes) // HUGE_PAGE * HUGE_PAGE, start + end * self._block_bytes, HUGE_PAGE
            )

    @property
    def _end(self) -> int:
        return self._address + self._regions * self._region_bytes
