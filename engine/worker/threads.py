"""Limits of the libraries under torch; each takes effect only before torch is imported in the process."""

import os

SPINS = "10000"
# 128: five products a layer have four shapes, so 32 batch sizes keep their kernels; making one anew takes 0.8 ms.
KERNELS_KEPT = "128"


def places(threads: int, rank: int, ranks: int) -> tuple[int, ...]:
    """Cores for the threads of a rank, where all ranks together use every core that they may; else none are named.

    `ranks` are those of all replicas, and `rank` is counted over all of them.

    Threads that wait for each other 300 times a step must not share a core: the system puts them there now and then,
    next to whoever woke them, and a step then takes twice as long.
    """
    if not hasattr(os, "sched_getaffinity"):
        return ()
    usable = sorted(os.sched_getaffinity(0))
    return tuple(usable[rank * threads : (rank + 1) * threads]) if threads * ranks == len(usable) else ()


def stay(cores: tuple[int, ...]) -> None:
    """Keep this thread on the first of its rank's cores; torch's threads, made before, go anywhere."""
    import torch

    if cores:
        torch.ones(1 << 18).exp_()  # makes them: threads begin where the one that makes them is kept
        os.sched_setaffinity(0, {cores[0]})


def limit_libraries() -> None:
    """Let idle compute threads sleep soon, and bound the kernels that oneDNN keeps; a value the user set stays.

    GNU OpenMP lets a thread that waits for its fellows spin for milliseconds. When another process wants the core, the
    fellow can't run, the spinner burns its share, and steps take ten times as long or more. This bound outlasts
    the gaps within a step, and no more.

    oneDNN keeps a kernel of about 0.6 MiB for each shape of a matrix product, 1,024 of them unless told otherwise;
    since nearly each step with prompts has a shape of its own, they would fill memory that no plan knows of.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS_KEPT)
