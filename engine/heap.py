"""Controls when the C library's heap returns memory to the system."""

import contextlib
import ctypes
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
LARGE_ALLOCATION = 4 << 20
# The values that glibc's own thresholds grow to.
_MMAP_DEFAULT, _TRIM_DEFAULT = 32 << 20, 64 << 20


def trim_heap() -> None:
    """Return the heap's free pages to the system, also those between objects that are still in use (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def large_allocations_mapped() -> Iterator[None]:
    """A context in which an allocation of 4 MiB or more returns to the system as soon as it is freed (glibc only).

    Otherwise allocations of up to 32 MiB come from the heap, where any small object next to them can keep their pages:
    half of a model's size can be lost that way.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, LARGE_ALLOCATION)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _MMAP_DEFAULT)
        mallopt(_TRIM_THRESHOLD, _TRIM_DEFAULT)
