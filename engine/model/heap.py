"""How the C library's heap is used while weights are loaded."""

import contextlib
import ctypes
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
SMALL = 4 << 20
# What glibc's own thresholds grow to.
LARGE, MOST_KEPT = 32 << 20, 64 << 20


def give_back() -> None:
    """Give back what is free between things that are kept: pieces below 4 MiB come from the heap."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc
        trim(0)


@contextlib.contextmanager
def pieces_given_back() -> Iterator[None]:
    """Within it a piece of 4 MiB or more goes back to the system as soon as it is freed.

    Else pieces of up to 32 MiB come from the heap, where whatever small thing is kept beside them keeps them too: half
    of the model can be lost so.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # no glibc
        yield
        return
    mallopt(_MMAP_THRESHOLD, SMALL)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, LARGE)
        mallopt(_TRIM_THRESHOLD, MOST_KEPT)
