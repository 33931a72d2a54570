"""What is known about the errors of simulated latencies, and the mark of results that are simulated."""

import functools
import hashlib
import json
from typing import Any

from msgspec import Struct, convert

from engine.data import datasets_folder
from engine.hardware.description import description_path, read_hardware


class Errors(Struct, frozen=True, forbid_unknown_fields=True):
    """Relative errors of one metric against published measurements (`make sim-check`)."""

    median: float
    p90: float
    rows: int


@functools.cache
def known_errors() -> dict[str, dict[str, Errors]]:
    """The errors by hardware and metric (tpot, ttft), of hardware that published measurements exist for."""
    path = datasets_folder() / "hardware" / "accuracy.json"
    return convert(json.loads(path.read_text()), dict[str, dict[str, Errors]])


def simulation_mark(name: str) -> dict[str, Any]:
    """What `summary.json` says about a simulated configuration: on which hardware, and how far to trust its latencies.

    Args:
        name: of the hardware, as behind `sim:`.

    Raises:
        ConfigError: there is no such hardware.
    """
    hardware = read_hardware(name)
    errors = {
        metric: {"median": error.median, "p90": error.p90, "rows": error.rows}
        for metric, error in known_errors().get(name, {}).items()
    }
    return {"hardware": name, "title": hardware.title, "description": description_version(name), "errors": errors}


def description_version(name: str) -> str:
    """The version of a description: the beginning of the SHA-256 of its file."""
    return hashlib.sha256(description_path(name).read_bytes()).hexdigest()[:12]
