"""A row of `make faults`, and the world in which a fault happens."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.perf.faults.held import Held, family, held, leaked, left_behind
from tests.serving import Served, serve

INJECTION = Path(__file__).parent / "injection"
DUMMY = ("--load-format", "dummy", "--served-model-name", "tiny", "--max-model-len", "4K", "--disable-log-requests")


@dataclass
class Row:
    """What one fault did: what clients saw, until when, and what was not given back."""

    fault: str
    client_saw: str
    seconds: float
    leaked: dict[str, int]
    wrong: list[str] = field(default_factory=list)

    def expect(self, holds: bool, otherwise: str) -> None:
        """Note what should have been otherwise."""
        if not holds:
            self.wrong.append(otherwise)

    def as_record(self) -> dict[str, Any]:
        total = sum(self.leaked.values())
        kinds = {f"leaked_{kind}": count for kind, count in self.leaked.items()}
        return {
            "fault": self.fault, "client_saw": self.client_saw, "seconds": round(self.seconds, 2), "leaked": total,
            **kinds, "wrong": "; ".join(self.wrong),
        }  # fmt: skip


@dataclass
class World:
    """A server under test, with a temporary folder of its own and switches for the faults."""

    served: Served
    folder: Path  # the server's TMPDIR
    faults: Path  # files in it switch faults on
    processes: list[psutil.Process]
    before: Held

    def switch_on(self, fault: str) -> None:
        (self.faults / fault).touch()

    def switch_off(self, fault: str) -> None:
        (self.faults / fault).unlink()

    def warm(self) -> None:
        """Count what is held from now on; called once all that is made on first use was used."""
        time.sleep(0.5)
        self.before = held(self.served, self.folder)

    def leaked(self) -> dict[str, int]:
        """What the server, which runs on, doesn't give back."""
        return leaked(self.served, self.folder, self.before)

    def left_behind(self) -> dict[str, int]:
        """What the server, which has ended, left."""
        return left_behind(self.processes, self.folder)

    def last_line(self) -> str:
        return self.served.output().splitlines()[-1]


@contextlib.contextmanager
def world(model: str, *flags: str) -> Iterator[World]:
    """A server of a tiny model that can be made to fail."""
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        base = Path(name)
        for sub in ("tmp", "faults"):
            (base / sub).mkdir()
        paths = [str(INJECTION), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {
            "PYTHONPATH": os.pathsep.join(paths),
            "REDLINE_FAULTS": str(base / "faults"),
            "TMPDIR": str(base / "tmp"),
        }
        with serve(base, model, *DUMMY, *flags, env=env) as served:
            yield World(served, base / "tmp", base / "faults", family(served), Held())
