"""Jobs that go on until they are interrupted: `python -m tests.bench.simulation.interrupted_jobs FOLDER`."""

import math
import os
import sys
import time
from pathlib import Path

from bench.measurement.run import InterruptedRunError, stop_on_interrupt
from bench.search.windows import TimeBudget
from bench.simulation.processes import Report, run_all


def wait_and_save(report: Report, folder: Path, number: int) -> None:
    """Wait for an interrupt as a measurement does, and then save; a second interrupt would prevent that."""
    budget = TimeBudget(math.inf, time.monotonic)
    with stop_on_interrupt(budget):
        (folder / f"begun-{number}").write_text(str(os.getpid()))
        while not budget.stopped:
            report(f"waiting {number}")
            time.sleep(0.01)
        time.sleep(0.3)
        (folder / f"saved-{number}").write_text("")
    raise InterruptedRunError(None)


def main(folder: Path) -> int:
    try:
        for _ in run_all(wait_and_save, [(folder, number) for number in range(4)], 2, lambda *_: None):
            raise AssertionError("no job ends by itself")
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
