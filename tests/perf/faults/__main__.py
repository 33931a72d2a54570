"""`make faults`: what clients see when something fails, how long it takes, and what isn't given back.

Real servers of a tiny model on this machine, faults by signals, by resets, and by code put into the server from outside
(injection/). Rows go to results/faults.json; exit code 1 where something leaked or was otherwise than it should.
ONLY="requests steps processes caches instrument" picks groups of faults.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import httpx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.perf.faults.cache_faults import interleavings
from tests.perf.faults.engine_faults import STEP_FAULTS, request_faults
from tests.perf.faults.instrument_faults import full_disk
from tests.perf.faults.process_faults import PROCESS_FAULTS
from tests.perf.faults.row import Row
from tests.tiny import write_tiny

RESULTS = Path("results") / "faults.json"
Fault = Callable[[str], "Row | Iterable[Row] | None"]
GROUPS: dict[str, Sequence[Fault]] = {
    "requests": (request_faults,),
    "steps": STEP_FAULTS,
    "processes": PROCESS_FAULTS,
    "caches": (interleavings,),
    "instrument": (full_disk,),
}


def rows_of(fault: Fault, model: str) -> Iterator[Row]:
    """The rows of one fault; where it could not be brought about, one that says why."""
    try:
        found = fault(model)
        if found is not None:
            yield from [found] if isinstance(found, Row) else found
    except (AssertionError, OSError, httpx.HTTPError, subprocess.SubprocessError) as error:
        yield Row(getattr(fault, "__name__", str(fault)), "", 0.0, {}, [f"{type(error).__name__}: {error}"])


def main() -> int:
    wanted = os.environ.get("ONLY", " ".join(GROUPS)).split()
    if unknown := set(wanted) - set(GROUPS):
        print(f"ONLY={' '.join(sorted(unknown))}: the groups are {', '.join(GROUPS)}")
        return 2
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        model = write_tiny(Path(name))
        for group in wanted:
            for row in (row for fault in GROUPS[group] for row in rows_of(fault, model)):
                rows.append(row)
                print(f"{row.fault}: {row.client_saw[:100]}, {row.seconds:.1f} s, leaked {sum(row.leaked.values())}")
                for what in row.wrong:
                    print(f"  WRONG: {what}")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps([row.as_record() for row in rows], indent=1) + "\n")
    table = Table("fault", "client saw", "s", "leaked", title="Faults")
    for row in rows:
        table.add_row(row.fault, escape(row.client_saw[:160]), f"{row.seconds:.1f}", str(sum(row.leaked.values())))
    Console(width=200).print(table)
    failed = [row for row in rows if row.wrong or any(row.leaked.values())]
    for row in failed:
        print(f"FAILED: {row.fault}: {'; '.join(row.wrong) or row.leaked}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
