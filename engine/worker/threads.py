"""How the threads of torch wait for each other."""

import os

SPINS = "10000"


def bound_spinning() -> None:
    """Let idle compute threads sleep soon; takes effect only before torch is imported in the process.

    GNU OpenMP lets a thread that waits for its fellows spin for milliseconds. When another process wants the core, the
    fellow can't run, the spinner burns its share, and steps take ten times as long or more. This bound outlasts
    the gaps within a step, and no more. A value the user set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
