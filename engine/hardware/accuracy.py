"""What is known about the errors of simulated latencies, and the mark of results that are simulated."""

import functools
import hashlib
import json
from typing import Any

from msgspec import Struct, convert

from engine.data import datasets_folder
from engine.hardware.description import Hardware, description_path, read_hardware


class Errors(Struct, frozen=True, forbid_unknown_fields=True):
    """Relative errors of one metric in closed loops, against published measurements (`make sim-check`)."""

    median: float
    p90: float
    rows: int


Known = dict[str, dict[str, dict[str, Errors]]]


@functools.cache
def known_errors() -> Known:
    """The errors by hardware, engine (v1, v0) and metric (tpot, ttft), where published measurements exist."""
    path = datasets_folder() / "hardware" / "accuracy.json"
    return convert(json.loads(path.read_text()), Known)


def simulation_mark(name: str, engine: str | None) -> dict[str, Any]:
    """What `summary.json` says about a simulated configuration: on which hardware, and how far to trust its latencies.

    Args:
        name: of the hardware, as behind `sim:`.
        engine: v1, v0, or None for the default, v1.

    Raises:
        ConfigError: there is no such hardware.
    """
    hardware, engine = read_hardware(name), engine or "v1"
    errors = {
        metric: {"median": error.median, "p90": error.p90, "rows": error.rows}
        for metric, error in known_errors().get(name, {}).get(engine, {}).items()
    }
    mark = {
        "hardware": name, "title": hardware.title, "description": description_version(name), "engine": engine,
        "errors": errors,
    }  # fmt: skip
    note = unvalidated(hardware, engine)
    return mark | {"note": note} if note else mark


def unvalidated(hardware: Hardware, engine: str | None) -> str:
    """What the user should know about the costs of an engine's host that no measurement confirms; empty if nothing."""
    if engine != "v0" or hardware.profiled is not None:
        return ""
    return f"host costs of V0: {hardware.sources[hardware.host.v0.source]}"


def description_version(name: str) -> str:
    """The version of a description: the beginning of the SHA-256 of its file."""
    return hashlib.sha256(description_path(name).read_bytes()).hexdigest()[:12]
