"""The pages of a cache are there before they are used, and none far beyond."""

import ctypes
import mmap
import time

import numpy as np
import pytest

from engine.kernels.cpu.huge_pages import HUGE_PAGE, lazy_zeros
from engine.worker.page_supply import PageSupply

REGIONS, BLOCKS, BLOCK_BYTES = 6, 4096, 16 << 10


def resident(memory: np.ndarray) -> int:
    """Bytes of it that take memory. Its mapping may have merged with that of another array, so its own pages count."""
    start = memory.ctypes.data
    pages = np.zeros(-(-memory.nbytes // mmap.PAGESIZE), dtype=np.uint8)
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    if mincore(ctypes.c_void_p(start), ctypes.c_size_t(memory.nbytes), ctypes.c_void_p(pages.ctypes.data)):
        raise OSError(ctypes.get_errno(), "mincore")
    return int((pages & 1).sum()) * mmap.PAGESIZE


def wait_for(supply: PageSupply, blocks: int) -> None:
    end = time.monotonic() + 20
    while supply.supplied < blocks and time.monotonic() < end:
        time.sleep(0.01)
    assert supply.supplied >= blocks


@pytest.fixture
def memory() -> np.ndarray:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        pytest.skip("the system has no large pages")
    return lazy_zeros(REGIONS * BLOCKS * BLOCK_BYTES)


def test_pages_go_ahead_of_the_highest_block(memory: np.ndarray) -> None:
    memory[5] = 7
    supply = PageSupply(memory, memory.ctypes.data, REGIONS, BLOCKS * BLOCK_BYTES, BLOCK_BYTES, ahead_bytes=0)
    try:
        a_page = HUGE_PAGE // BLOCK_BYTES
        wait_for(supply, a_page)
        most = 2 * a_page
        for block in (0, a_page, 3 * a_page, 2 * a_page):
            supply.reach(block)
            most = max(most, block + 2 * a_page)
            wait_for(supply, block + a_page)
            assert supply.supplied <= most
            # Each region's begin and end may lie within a page.
            assert resident(memory) <= REGIONS * (most * BLOCK_BYTES + 2 * HUGE_PAGE)
        supply.reach(BLOCKS - 1)
        wait_for(supply, BLOCKS)
        assert resident(memory) >= REGIONS * BLOCKS * BLOCK_BYTES
        assert memory[5] == 7
        assert not memory[6:].any()
    finally:
        supply.close()


def test_a_small_cache_is_supplied_whole_before_its_use(memory: np.ndarray) -> None:
    supply = PageSupply(memory, memory.ctypes.data, REGIONS, BLOCKS * BLOCK_BYTES, BLOCK_BYTES)
    try:
        wait_for(supply, BLOCKS)
        assert resident(memory) >= REGIONS * BLOCKS * BLOCK_BYTES
    finally:
        supply.close()
