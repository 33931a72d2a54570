"""Supplies the pages of the KV cache ahead of their use.

Memory that was never touched costs whoever touches it first: a large page some 0.1 ms, on a virtual machine whose host
has to find it as well up to 5 ms. New blocks lie on new pages in every layer at once, so a step would pay for dozens.
A thread that runs only when a core has nothing else to do goes ahead of the highest block in use: far, for a server
under load has no such moments, but not to the end, so that a large cache takes memory as it is needed.
"""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from engine.model.fused import HUGE_PAGE

AHEAD_BYTES = 1 << 30
_POPULATE_WRITE = 23  # of madvise, since Linux 5.14: as if each page were written to


class PageSupply:
    """Of a cache of `regions`, one after the other, `region_bytes` each, with `block_bytes` of every block in each.

    Until it is closed it keeps `memory`, which they lie in, and goes up to `ahead_bytes` ahead. Without support by the
    system nothing is done ahead.
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
        self._stride = max(1, HUGE_PAGE // block_bytes)  # blocks, supplied at a time: a page of each region
        self._ahead = max(2 * self._stride, ahead_bytes // (regions * block_bytes))  # blocks
        self._wanted = 0  # blocks
        self._supplied = 0
        self._more = threading.Event()
        self.reach(0)
        threading.Thread(target=self._supply, name="page-supply", daemon=True).start()

    @property
    def supplied(self) -> int:
        """Blocks, from the first on, whose pages are there."""
        return self._supplied

    def reach(self, block: int) -> None:
        """Blocks up to this one are in use: the pages of the next ones are wanted."""
        if block + self._ahead // 2 >= self._wanted:
            most = self._region_bytes // self._block_bytes
            self._wanted = min(block + self._ahead, most)
            self._more.set()

    def close(self) -> None:
        """End the thread, soon."""
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
            while self._supplied < self._wanted:
                blocks = min(self._supplied + self._stride, self._wanted)
                for page in self._pages(self._supplied, blocks):
                    first = max(page, self._address)
                    if self._closed or madvise(first, min(page + HUGE_PAGE, self._end) - first, _POPULATE_WRITE):
                        return
                self._supplied = blocks

    def _pages(self, first: int, end: int) -> Iterator[int]:
        """Addresses of the large pages that blocks `first` to `end` lie on.

        One at a time: between two of them the core is given back to whoever wants it.
        """
        for region in range(self._regions):
            start = self._address + region * self._region_bytes
            yield from range(
                (start + first * self._block_bytes) // HUGE_PAGE * HUGE_PAGE, start + end * self._block_bytes, HUGE_PAGE
            )

    @property
    def _end(self) -> int:
        return self._address + self._regions * self._region_bytes
