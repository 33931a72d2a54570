"""Reads a sweep file (YAML): configurations, workloads, and how to measure them.

title: Prefix caching on and off
seed: 1
model: smollm2-135m                    # default of all configurations
serve: {max-num-seqs: 16}              # flags of `redline serve` for all configurations; null removes one
configurations:
  caching: {serve: {enable-prefix-caching: true}, note: a few words}      # flags, and a note for tables
  other: {command: "vllm serve {model} --port {port}", health: /health}   # or any other server
  gateway: {url: "https://h/v1", served_model: m, headers: {X-Team: a}}   # or a running one; all kinds also take ca,
                                                  # insecure, extra_body, ignore_eos, stream_options (redline bench)
workloads:
  - {kind: random, input: 500, output: 2000}      # as in make_workload(); optionally name, and options of its own
  - {preset: visionarena-sample, output: 32}      # a workload preset, or a file
  - {kind: random, input: 500, output: 2000, model: m, serve: {tp: 4}, configurations: [caching]}
                                                  # a model, flags and a choice of configurations of its own
  - {kind: images, offline: 200}                  # all requests at once, without a server; on simulated hardware
options: {precision: 10%, max_minutes: 15}        # on simulated hardware (device: sim:h100) max_virtual_minutes: 1440
                                                  # also arrivals: gamma, burstiness: 0.5, or trace: FILE
                                                  # ladder: false, or multiples of the lowest rate found: [0.75, 1]
                                                  # search: first (the others are measured on its ladder only)
                                                  # rates: [1, 2] instead of a search
                                                  # rounds: 5 measures ladder or rates five times, interleaved
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.results import PointRecord
from bench.search.windows import MAX_VIRTUAL_MINUTES
from bench.sweeps.configurations import Configuration, flags_of, integer, only_known, positive, read_configuration
from bench.workloads import ANY_VOCABULARY, Encode, Workload, known_fields, make_workload, needs_vocabulary
from bench.workloads.arrivals import MOST_RATE, Arrivals
from bench.workloads.presets import read_workload, read_yaml
from engine.data import datasets_folder

START_MINUTES = 0.3  # estimate for starting and stopping a server

_TOP = frozenset({"title", "description", "seed", "model", "serve", "configurations", "workloads", "options"})
_TRACE = ("trace", "trace_unit", "skip_bad_rows")
_ARRIVALS = frozenset({"arrivals", "burstiness", *_TRACE})
_LIMITS = {"max_minutes", "max_virtual_minutes"}
_OF_SWEEP = ("name", "preset", "model", "serve", "configurations")  # fields of a workload that make_workload() lacks
_OPTIONS = (
    _ARRIVALS
    | _LIMITS
    | {"offline", "requests"}
    | {"precision", "window", "warmup", "rates", "search", "ladder", "rounds", "limits"}
)


@dataclass(frozen=True, slots=True)
class SweepOptions:
    """How one workload is measured, the same for all configurations."""

    precision: float = 0.10
    max_minutes: float = 15.0  # of one configuration on one workload: search and ladder
    max_virtual_minutes: float = MAX_VIRTUAL_MINUTES  # the same on simulated hardware, where time costs little
    window_s: float | None = None
    warmup_s: float | None = None
    rates: tuple[float, ...] | None = None  # instead of a search
    search: str = "all"  # or "first": only the first configuration
    ladder: bool | tuple[float, ...] = True  # or multiples of the lowest rate found
    rounds: int = 1  # of ladder or rates, with configurations interleaved, so that drift affects all equally
    limits: dict[str, float] = field(default_factory=dict)  # column of points.csv -> highest allowed value
    arrivals: Arrivals = field(default_factory=Arrivals)
    offline: int | None = None  # number of requests that are submitted at once, instead of a search
    requests: bool = True  # whether every request is written to a file


@dataclass(frozen=True, slots=True)
class SweepWorkload:
    """A workload of a sweep: its description, its name in figures, and how it is measured."""

    name: str
    spec: dict[str, Any]
    max_tokens: int
    options: SweepOptions
    model: str | None = None  # instead of that of the configurations
    serve: dict[str, Any] = field(default_factory=dict)  # flags of `redline serve` on this workload
    only: tuple[str, ...] = ()  # names of the configurations that are measured on it; (): all

    @property
    def needs_vocabulary(self) -> bool:
        return needs_vocabulary(self.spec)

    def build(self, vocab_size: int | None, encode: Encode | None = None) -> Workload:
        workload = make_workload(self.spec, vocab_size, encode)
        return workload if workload.name == self.name else _Renamed(self.name, workload)


class _Renamed:
    """A workload under the name that its sweep gives it."""

    def __init__(self, name: str, workload: Workload):
        self.name = name
        self.max_tokens = workload.max_tokens
        self.describe = workload.describe
        self.notes = workload.notes
        self.requests = workload.requests


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """A whole sweep, checked."""

    name: str
    title: str
    description: str
    seed: int
    configurations: list[Configuration]
    workloads: list[SweepWorkload]
    data: dict[str, Any]  # as in the file

    def max_minutes(self) -> float:
        """The time limit of all configurations that are not simulated, including an estimate for server starts."""
        measured = [not configuration.is_simulated for configuration in self.configurations]
        return sum(_max_minutes(w.options, measured) for w in self.workloads)

    def of_workload(self, workload: SweepWorkload) -> list[Configuration]:
        """The configurations that are measured on a workload, with what the workload sets."""
        chosen = [one for one in self.configurations if not workload.only or one.name in workload.only]
        return [one.of_workload(workload.model, workload.serve) for one in chosen]

    @property
    def is_simulated(self) -> bool:
        """Whether all configurations are."""
        return all(configuration.is_simulated for configuration in self.configurations)


def _max_minutes(options: SweepOptions, measured: list[bool]) -> float:
    """The time limit of one workload, including server starts; `measured` says which configurations count."""
    configurations = sum(measured)
    rounds = options.rounds if options.rates or options.ladder else 0
    searches = 0 if options.rates else int(measured[0]) if options.search == "first" else configurations
    whole = configurations if options.rates else searches  # the others only have the ladder's half of the time
    minutes = (whole + (configurations - whole) / 2) * options.max_minutes
    return minutes + (searches + rounds * configurations) * START_MINUTES


def presets(*, simulated: bool = False) -> dict[str, Path]:
    """The preset sweeps by name; with `simulated` those for simulated hardware, which have its models, come first."""
    folder = datasets_folder() / "presets"
    files = sorted(folder.glob("*.yaml")) + (sorted((folder / "simulated").glob("*.yaml")) if simulated else [])
    return {path.stem: path for path in files if "configurations" in _load(path)}


def read_sweep(path: Path, device: str | None = None) -> SweepPlan:
    """Read and check a sweep; raises BenchError naming the file and the field that is wrong.

    With `device`, all configurations run on it, whatever the file says.
    """
    data = _load(path)
    try:
        return _plan(path.stem, _on_device(data, device) if device else data)
    except BenchError as error:
        raise BenchError(f"{path}: {error}") from None


def _load(path: Path) -> dict[str, Any]:
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise BenchError(f"{path}: a sweep must have the fields configurations and workloads at its top level")
    return data


def _on_device(data: dict[str, Any], device: str) -> dict[str, Any]:
    """The sweep with one device for all its configurations, in place of their own."""
    configurations = {}
    for name, entry in _mapping(data, "configurations").items():
        known = dict(entry) if isinstance(entry, dict) else {}
        for kind in ("command", "url"):
            if known.get(kind) is not None:
                raise BenchError(f"configurations.{name}.{kind}: --device {device} needs Redline's own servers")
        flags = known.get("serve") or {}
        own = {
            flag: value for flag, value in flags.items() if str(flag).replace("_", "-").removeprefix("--") != "device"
        }
        configurations[name] = known | {"serve": own}
    return data | {"serve": (data.get("serve") or {}) | {"device": device}, "configurations": configurations}


def _plan(name: str, data: dict[str, Any]) -> SweepPlan:
    only_known(data, _TOP, "the sweep")
    seed = data.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise BenchError(f"seed must be an integer, not {seed!r}")
    configurations = _mapping(data, "configurations")
    workloads = data.get("workloads")
    if not isinstance(workloads, list) or not workloads:
        raise BenchError("workloads must be a list with at least one workload")
    options = _options(data.get("options") or {}, SweepOptions(), "options")
    built = [_workload(entry, options, f"workloads[{i}]", configurations) for i, entry in enumerate(workloads)]
    names = [workload.name for workload in built]
    for doubled in {n for n in names if names.count(n) > 1}:
        raise BenchError(f"two workloads are named {doubled!r}: set `name` for one of them")
    return SweepPlan(
        name=name,
        title=str(data.get("title") or name),
        description=str(data.get("description") or ""),
        seed=seed,
        configurations=[
            read_configuration(str(n), entry, data, needs_model=any(one.model is None for one in built))
            for n, entry in configurations.items()
        ],
        workloads=built,
        data=data,
    )


def _workload(entry: Any, options: SweepOptions, where: str, configurations: dict[Any, Any]) -> SweepWorkload:
    if not isinstance(entry, dict):
        raise BenchError(f"{where} must have fields such as kind, input and output, not {entry!r}")
    own = {key: value for key, value in entry.items() if key in _OPTIONS}
    spec = {key: value for key, value in entry.items() if key not in _OPTIONS and key not in _OF_SWEEP}
    try:
        if "preset" in entry:
            spec = read_workload(str(entry["preset"])) | spec
        spec |= _trace_fields(spec, own, options.arrivals)
        workload = make_workload(spec, ANY_VOCABULARY)
    except BenchError as error:
        raise BenchError(f"{where}: {error}") from None
    only = entry.get("configurations", [])
    if not isinstance(only, list) or not set(map(str, only)) <= set(map(str, configurations)):
        known = ", ".join(map(str, configurations))
        raise BenchError(
            f"{where}.configurations must be a list of configurations of the sweep ({known}), not {only!r}"
        )
    return SweepWorkload(
        str(entry.get("name") or workload.name),
        spec,
        workload.max_tokens,
        _options(own, options, where),
        model=str(entry["model"]) if entry.get("model") else None,
        serve=flags_of(entry.get("serve"), f"{where}.serve"),
        only=tuple(map(str, only)),
    )


def _trace_fields(spec: dict[str, Any], own: dict[str, Any], common: Arrivals) -> dict[str, Any]:
    """Options of the arrivals that are also fields of the workload, for its lengths and bad rows."""
    found = {key: own[key] for key in _TRACE if key in own}
    if spec.get("kind") == "trace" and "trace" not in spec and "trace" not in found and common.trace is not None:
        found |= {"trace": common.trace, "trace_unit": common.trace_unit, "skip_bad_rows": common.skip_bad_rows}
    known = known_fields(spec)
    return {key: value for key, value in found.items() if key in known}


def _options(entry: Any, defaults: SweepOptions, where: str) -> SweepOptions:
    if not isinstance(entry, dict):
        raise BenchError(f"{where} must have fields such as precision and max_minutes")
    only_known(entry, _OPTIONS, where)
    read: dict[str, Callable[[Any, str], Any]] = {
        "precision": _precision, "search": _search, "ladder": _ladder, "limits": _limits, "rates": _rates,
    }  # fmt: skip
    changed: dict[str, Any] = {}
    for key, value in entry.items():
        if key in ("rounds", "offline"):
            changed[key] = integer(entry, key, where, least=1)
        elif key == "requests":
            changed[key] = _boolean(value, f"{where}.{key}")
        elif key in read:
            changed[key] = read[key](value, f"{where}.{key}")
        elif key not in _ARRIVALS:
            changed[f"{key}_s" if key in ("window", "warmup") else key] = positive(value, f"{where}.{key}")
    if entry.keys() & _ARRIVALS:
        changed["arrivals"] = _arrivals(entry, where)
    return _checked(replace(defaults, **changed), where)


def _checked(options: SweepOptions, where: str) -> SweepOptions:
    if options.search == "first" and not options.ladder and not options.rates:
        raise BenchError(
            f"{where}.search is first, which needs a ladder, because the other configurations are measured on the "
            "ladder only"
        )
    return options


def _boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise BenchError(f"{where} must be true or false, not {value!r}")
    return value


def _rates(value: Any, where: str) -> tuple[float, ...]:
    if not isinstance(value, list) or not value:
        raise BenchError(f"{where} must be a list of request rates, not {value!r}")
    rates = tuple(sorted({positive(rate, where) for rate in value}))
    if rates[-1] > MOST_RATE:
        raise BenchError(f"{where} must have rates up to {MOST_RATE:g} requests/s, not {rates[-1]:g}")
    return rates


def _search(value: Any, where: str) -> str:
    if value not in ("all", "first"):
        raise BenchError(f"{where} must be all or first, not {value!r}")
    return str(value)


def _ladder(value: Any, where: str) -> bool | tuple[float, ...]:
    if isinstance(value, list) and value:
        return tuple(sorted({positive(share, where) for share in value}))
    if not isinstance(value, bool):
        raise BenchError(f"{where} must be true, false or a list of multiples of the lowest rate found, not {value!r}")
    return value


def _arrivals(entry: dict[str, Any], where: str) -> Arrivals:
    for key in ("arrivals", "trace", "trace_unit"):
        if key in entry and not isinstance(entry[key], str):
            raise BenchError(f"{where}.{key} must be a name, not {entry[key]!r}")
    skip, kind = entry.get("skip_bad_rows", False), entry.get("arrivals", "poisson")
    if not isinstance(skip, bool):
        raise BenchError(f"{where}.skip_bad_rows must be true or false, not {skip!r}")
    if "trace_unit" in entry and "trace" not in entry:
        raise BenchError(f"{where}.trace_unit needs trace")
    if "burstiness" in entry and kind != "gamma":
        raise BenchError(f"{where}.burstiness needs arrivals: gamma")
    burstiness = positive(entry.get("burstiness", 1.0), f"{where}.burstiness")
    try:
        return Arrivals(kind, burstiness, entry.get("trace"), entry.get("trace_unit", "auto"), skip)
    except BenchError as error:
        raise BenchError(f"{where}: {error}") from None


def _limits(value: Any, where: str) -> dict[str, float]:
    known = sorted(f.name for f in fields(PointRecord) if re.search(r"_p\d+_ms$", f.name))
    if not isinstance(value, dict):
        raise BenchError(f"{where} must have columns of points.csv and their limits, such as ttft_p99_ms: 2000")
    only_known(value, known, where)
    return {column: positive(limit, f"{where}.{column}") for column, limit in value.items()}


def _precision(value: Any, where: str) -> float:
    text = str(value).strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if isinstance(value, bool) or not 0 < share < 1:
        raise BenchError(f"{where} must be a value such as 10% or 0.1, not {value!r}")
    return share


def _mapping(data: dict[str, Any], key: str) -> dict[Any, Any]:
    value = data.get(key)
    if not isinstance(value, dict) or not value:
        raise BenchError(f"{key} must have at least one named entry")
    return value
