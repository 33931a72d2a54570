"""Caches of features and their mirrors under random interleavings of requests, replicas that die, and evictions."""

import time
from collections.abc import Iterator

from tests.engine.frontend.interleavings import INTERLEAVINGS, run_interleaving
from tests.perf.faults.row import Row


def interleavings(_model: str) -> Iterator[Row]:
    """A row for each number of API processes and replicas; every seed must pass."""
    for (front_ends, replicas, capacity), count in INTERLEAVINGS.items():
        begin, served = time.monotonic(), 0
        row = Row(f"{count} interleavings, {front_ends} API processes × {replicas}, cache of {capacity} B", "", 0.0, {})
        for seed in range(count):
            try:
                served += run_interleaving(seed, front_ends, replicas, capacity)
            except AssertionError as error:
                row.wrong.append(f"seed {seed}: {error}")
        row.client_saw, row.seconds = f"{served} requests served", time.monotonic() - begin
        row.expect(served > count, "few requests were served")
        yield row
