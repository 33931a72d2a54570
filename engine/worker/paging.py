"""Supplies the pages of the KV cache ahead of their use.

Memory that was never touched costs whoever touches it first: a large page some 0.1 ms, on a virtual machine whose host
has to find it as well up to 5 ms. New blocks lie on new pages in every layer at once, so a step would pay for dozens.
A thread that runs only when a core has nothing else to do goes ahead of the highest block in use; no page further on
is taken, so that a cache takes as much memory as it once needed.
"""

import ctypes
import os
import threading
from contextlib import suppress
from typing import Any

from engine.model.fused import HUGE_PAGE

_POPULATE_WRITE = 23  # of madvise, since Linux 5.14: as if each page were written to


class PageSupply:
    """Of a cache of `regions`, one after the other, `region_bytes` each, with `block_bytes` of every block in each.

    Until it is closed it keeps `memory`, which they lie in. Without support by the system nothing is done ahead.
    """

    def __init__(self, memory: Any, address: int, regions: int, region_bytes: int, block_bytes: int):
        self._memory = memory
        self._closed = False
        self._address = address
        self._regions = regions
        self._region_bytes = region_bytes
        self._block_bytes = block_bytes
        self._ahead = 2 * max(1, HUGE_PAGE // block_bytes)  # blocks
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
            wanted = self._wanted
            for region in range(self._regions):
                begin = self._address + region * self._region_bytes + self._supplied * self._block_bytes
                end = begin + (wanted - self._supplied) * self._block_bytes
                # A page at a time: between calls the core is given back to whoever wants it.
                for page in range(begin // HUGE_PAGE * HUGE_PAGE, end, HUGE_PAGE):
                    first = max(page, self._address)
                    if self._closed or madvise(first, min(page + HUGE_PAGE, self._end) - first, _POPULATE_WRITE):
                        return
            self._supplied = wanted

    @property
    def _end(self) -> int:
        return self._address + self._regions * self._region_bytes
