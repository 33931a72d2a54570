"""Durations of the phases of a start, which follow each other without a gap, so that they sum to its wall time."""

import contextlib
import os
import time
from pathlib import Path

SHORT_S = 0.05


class Phases:
    """Phases that follow each other. Times are of the system's monotonic clock, which all processes share."""

    def __init__(self, began: float | None = None):
        """`began` is when the first phase began; None: now."""
        self.seconds: dict[str, float] = {}
        self.began = time.monotonic() if began is None else began  # when the current phase began

    def end(self, name: str, seconds: float | None = None) -> None:
        """End a phase now, or after `seconds`; the next one begins there. A name may come again."""
        ended = time.monotonic() if seconds is None else self.began + seconds
        self.seconds[name] = self.seconds.get(name, 0.0) + ended - self.began
        self.began = ended

    def add(self, others: "dict[str, float]", rest: str) -> None:
        """Phases that something else has measured until about now; `rest` is what they leave of the time since."""
        for name, seconds in others.items():
            self.end(name, seconds)
        self.end(rest)

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def ledger_line(phases: Phases) -> str:
    """All phases in one line; those too short to show are summed up."""
    shown = {name: seconds for name, seconds in phases.seconds.items() if seconds >= SHORT_S}
    if rest := phases.total - sum(shown.values()):
        shown["other"] = rest
    return f"started in {phases.total:.2f} s: " + ", ".join(
        f"{name} {seconds:.2f} s" for name, seconds in shown.items()
    )


def process_start() -> float:
    """When this process began, on the monotonic clock; where the system does not say, the time of the first call."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        alive = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return time.monotonic() - alive
    return time.monotonic()
