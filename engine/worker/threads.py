"""Compute threads: pinning to cores, and limits of the libraries that torch uses."""

import os

SPINS = "10000"
# Five matrix products per layer have four shapes, so this keeps the kernels of 32 batch sizes. Making one takes 0.8 ms.
CACHED_KERNELS = "128"


def cores_of_rank(threads: int, rank: int, ranks: int) -> tuple[int, ...]:
    """The cores to pin a rank's threads to; empty unless all ranks together use every available core.

    Args:
        rank, ranks: counted over all replicas.

    Threads wait for each other about 300 times per step. Without pinning, the system sometimes puts two of them on one
    core, next to the thread that woke them, and a step takes twice as long.
    """
    if not hasattr(os, "sched_getaffinity"):
        return ()
    usable = sorted(os.sched_getaffinity(0))
    return tuple(usable[rank * threads : (rank + 1) * threads]) if threads * ranks == len(usable) else ()


def pin_thread(cores: tuple[int, ...]) -> None:
    """Pin the calling thread to the first of its rank's cores, after creating torch's threads, which stay unpinned."""
    import torch

    if cores:
        torch.ones(1 << 18).exp_()  # creates torch's threads, which inherit the affinity of the creating thread
        os.sched_setaffinity(0, {cores[0]})


def limit_libraries() -> None:
    """Bound OpenMP's spinning and oneDNN's kernel cache. Must run before torch is imported; the user's values win.

    GNU OpenMP lets a waiting thread spin for milliseconds. If another process needs the core, the thread that it waits
    for can't run, and steps take ten times as long or more. This bound covers the gaps within a step only.

    oneDNN caches a kernel of about 0.6 MiB for each shape of a matrix product, 1,024 by default. Nearly every step with
    prompts has a new shape, so they would fill memory that the memory plan does not count.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", CACHED_KERNELS)
