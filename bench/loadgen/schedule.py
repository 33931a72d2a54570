"""When the requests of a loop are due, and when their connections are opened."""

from dataclasses import dataclass

from bench.loadgen.job import OPEN_AHEAD_NS, OPEN_EACH_NS, Job, Start

NEVER = 1 << 62
POLLED_NS = 150_000  # before a send is due: a timer alone wakes some 60 us late, and later on an idle virtual machine
POLLED_SHARE = 0.05  # of the time between two sends at most: a generator with many of them is seldom asleep


@dataclass(frozen=True, slots=True)
class Schedule:
    """Times on the monotonic clock, in nanoseconds, one per request.

    offsets: intended times after time 0. polled_ns: how long before a send is due the loop no longer sleeps.
    """

    offsets: list[int]
    due: list[int]
    opened: list[int]
    polled_ns: int

    @classmethod
    def of(cls, job: Job, start: Start) -> "Schedule":
        """Connections of a closed loop are opened one by one: many at once do not fit into a server's listen queue."""
        if job.concurrency is None:
            due = [start.mono_ns + offset for offset in job.offsets_ns]
            return cls(list(job.offsets_ns), due, [at - OPEN_AHEAD_NS for at in due], _polled_ns(due))
        total = len(job.payloads)
        first = min(job.concurrency, total)
        later = [NEVER] * (total - first)
        last = start.mono_ns - OPEN_AHEAD_NS
        opened = [last - (first - 1 - number) * OPEN_EACH_NS for number in range(first)]
        return cls([0] * total, [start.mono_ns] * first + later, opened + later, 0)


def _polled_ns(due: list[int]) -> int:
    if len(due) < 2:
        return POLLED_NS
    return min(POLLED_NS, int(POLLED_SHARE * (due[-1] - due[0]) / (len(due) - 1)))
