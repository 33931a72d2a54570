"""What a sweep's YAML file says: configurations, workloads, and how to measure them.

title: Prefix caching on and off
seed: 1
model: smollm2-135m                    # of every configuration that names none
serve: {max-num-seqs: 16}              # flags of `redline serve` for all configurations; null takes one away again
configurations:
  caching: {serve: {enable-prefix-caching: true}, note: a few words}      # flags, and what they mean
  other: {command: "vllm serve {model} --port {port}", health: /health}   # or any server
  gateway: {url: "https://h/v1", served_model: m, headers: {X-Team: a}}   # or one that runs; with either also ca,
                                                  # insecure, extra_body, ignore_eos, stream_options (redline bench)
workloads:
  - {kind: random, input: 500, output: 2000}      # as in make_workload(); name, and options of its own, if wanted
  - {preset: visionarena-sample, output: 32}      # a workload that ships with the product, or a file
options: {precision: 10%, max_minutes: 15}        # and arrivals: gamma, burstiness: 0.5, or trace: FILE
                                                  # ladder: false, or shares of the lowest rate found: [0.75, 1]
                                                  # search: first (the others are measured on its ladder only)
                                                  # rates: [1, 2] instead of a search
                                                  # rounds: 5 runs ladder or rates five times over, in turns
"""

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from bench.arrivals import Arrivals
from bench.errors import BenchError
from bench.loadgen.target import Target
from bench.presets import read_workload, read_yaml
from bench.results import PointRow
from bench.server import has_flag, serve_flags
from bench.workloads import Encode, Workload, known_fields, make_workload, needs_vocabulary
from engine.data import datasets_folder

START_MINUTES = 0.3  # what starting and stopping a server is taken to cost
_ANY_VOCABULARY = 32_000  # names and lengths don't depend on it

_TOP = frozenset({"title", "description", "seed", "model", "serve", "configurations", "workloads", "options"})
_ASKING = ("ca", "insecure", "extra_body", "ignore_eos", "stream_options")  # fields of Target with the same names
_CONFIGURATION = frozenset(
    {"model", "serve", "command", "url", "health", "vocab_size", "api_key", "start_limit_s", "note"}
    | {"served_model", "headers", *_ASKING}
)
_TRACE = ("trace", "trace_unit", "skip_bad_rows")
_ARRIVALS = frozenset({"arrivals", "burstiness", *_TRACE})
_MOST_RATE = 1e6  # requests/s, beyond what any generator sends
_OPTIONS = _ARRIVALS | {"precision", "max_minutes", "window", "rates", "search", "ladder", "rounds", "limits"}


@dataclass(frozen=True, slots=True)
class SweepOptions:
    """How one workload is measured, the same for all configurations."""

    precision: float = 0.10
    max_minutes: float = 15.0  # of one configuration on one workload: search and ladder
    window_s: float | None = None
    rates: tuple[float, ...] | None = None  # these instead of a search
    search: str = "all"  # or only the "first" configuration
    ladder: bool | tuple[float, ...] = True  # or at these shares of the lowest rate found
    rounds: int = 1  # of ladder or rates: configurations take turns, so that a machine whose speed drifts favours none
    limits: dict[str, float] = field(default_factory=dict)  # column of points.csv -> highest value allowed
    arrivals: Arrivals = field(default_factory=Arrivals)


@dataclass(frozen=True, slots=True)
class Configuration:
    """One server to measure: `redline serve` with flags, any command line with a health URL, or one that runs."""

    name: str
    model: str | None
    serve: dict[str, Any] = field(default_factory=dict)
    command: str | None = None
    health: str = "/health"
    vocab_size: int | None = None  # for servers that don't tell it
    api_key: str | None = None
    start_limit_s: float = 900.0
    note: str = ""  # what it is, where its name alone doesn't say it
    url: str | None = None  # of a server that runs, or that the command starts ({port} is its port)
    served_model: str = ""  # to ask for, where the server has several
    asking: dict[str, Any] = field(default_factory=dict)  # further fields of its Target

    @property
    def runs(self) -> bool:
        """Whether it is a server that somebody else runs."""
        return self.command is None and self.url is not None

    def target(self, base_url: str) -> Target:
        """What is measured, once the server is at `base_url`."""
        target = Target(base_url, self.served_model, self.api_key, **self.asking)
        own = self.command is None and not self.runs
        return replace(target, insecure=True) if own and target.is_tls and target.ca is None else target

    def arguments(self, max_tokens: int) -> list[str]:
        """Flags of `redline serve` for a workload whose largest request has `max_tokens` tokens."""
        flags = serve_flags(self.serve)
        if not has_flag(flags, "--max-model-len"):
            flags += ["--max-model-len", str(model_len(max_tokens))]
        return [*flags, "--api-key", self.api_key] if self.api_key else flags

    def command_line(self, max_tokens: int) -> str:
        """The foreign command line with everything filled in but the port."""
        assert self.command is not None
        filled = self.command.replace("{max_model_len}", str(model_len(max_tokens)))
        return filled.replace("{model}", self.model or "")

    def describe(self) -> dict[str, Any]:
        """Plain data for result files, without the key."""
        known: dict[str, Any] = {"model": self.model} | ({"note": self.note} if self.note else {})
        asked = self.target((self.url or "http://127.0.0.1").replace("{port}", "1"))
        known |= {"requests": asked.described()} if asked.described() else {}
        if self.runs:
            return known | {"url": asked.base_url}
        if self.command is None:
            return known | {"serve": dict(self.serve)}
        return known | {"command": self.command.replace(self.api_key, "***") if self.api_key else self.command}

    def shown(self, max_tokens: int) -> str:
        """The command line in words, without the key."""
        if self.runs:
            return self.target(str(self.url)).base_url
        if self.command is not None:
            line = self.command_line(max_tokens)
        else:
            line = " ".join(["redline serve", str(self.model), *self.arguments(max_tokens)])
        return line.replace(self.api_key, "***") if self.api_key else line


@dataclass(frozen=True, slots=True)
class SweepWorkload:
    """A workload of a sweep: its description, the name it has on figures, and how it is measured."""

    name: str
    spec: dict[str, Any]
    max_tokens: int
    options: SweepOptions

    @property
    def needs_vocabulary(self) -> bool:
        return needs_vocabulary(self.spec)

    def build(self, vocab_size: int | None, encode: Encode | None = None) -> Workload:
        workload = make_workload(self.spec, vocab_size, encode)
        return workload if workload.name == self.name else _Renamed(self.name, workload)


class _Renamed:
    """A workload under the name its sweep gives it."""

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

    def most_minutes(self) -> float:
        """The longest the sweep can take, given servers that start in the usual time."""
        return sum(_most_minutes(w.options, len(self.configurations)) for w in self.workloads)


def _most_minutes(options: SweepOptions, configurations: int) -> float:
    """The longest one workload can take, with starting its servers."""
    turns = options.rounds if options.rates or options.ladder else 0
    searches = 0 if options.rates else 1 if options.search == "first" else configurations
    whole = configurations if options.rates else searches  # the others have the ladder's half of the time
    minutes = (whole + (configurations - whole) / 2) * options.max_minutes
    return minutes + (searches + turns * configurations) * START_MINUTES


def model_len(max_tokens: int) -> int:
    """A model length that leaves a tenth beyond the longest request."""
    return math.ceil(round(1.1 * max_tokens, 6))


def presets() -> dict[str, Path]:
    """The sweeps that ship with the product, by name."""
    files = sorted((datasets_folder() / "presets").glob("*.yaml"))
    return {path.stem: path for path in files if "configurations" in _load(path)}


def read_sweep(path: Path) -> SweepPlan:
    """Read and check a sweep; raises BenchError naming the file and the field that is wrong."""
    data = _load(path)
    try:
        return _plan(path.stem, data)
    except BenchError as error:
        raise BenchError(f"{path}: {error}") from None


def _load(path: Path) -> dict[str, Any]:
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise BenchError(f"{path}: a sweep has the fields configurations and workloads at its top level")
    return data


def _plan(name: str, data: dict[str, Any]) -> SweepPlan:
    _only(data, _TOP, "the sweep")
    seed = data.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise BenchError(f"seed must be a whole number, not {seed!r}")
    configurations = _mapping(data, "configurations")
    workloads = data.get("workloads")
    if not isinstance(workloads, list) or not workloads:
        raise BenchError("workloads must be a list with at least one workload")
    options = _options(data.get("options") or {}, SweepOptions(), "options")
    built = [_workload(entry, options, f"workloads[{i}]") for i, entry in enumerate(workloads)]
    names = [workload.name for workload in built]
    for doubled in {n for n in names if names.count(n) > 1}:
        raise BenchError(f"two workloads are called {doubled!r}; give one of them a name of its own")
    return SweepPlan(
        name=name,
        title=str(data.get("title") or name),
        description=str(data.get("description") or ""),
        seed=seed,
        configurations=[_configuration(str(n), entry, data) for n, entry in configurations.items()],
        workloads=built,
        data=data,
    )


def _configuration(name: str, entry: Any, data: dict[str, Any]) -> Configuration:
    where = f"configurations.{name}"
    entry = {} if entry is None else entry
    if not isinstance(entry, dict):
        raise BenchError(f"{where} must hold fields such as serve or command, not {entry!r}")
    _only(entry, _CONFIGURATION, where)
    command, url = entry.get("command"), entry.get("url")
    model = entry.get("model", None if url and command is None else data.get("model"))
    serve = {} if command is not None or url else _flags(data.get("serve"), "serve")
    serve |= _flags(entry.get("serve"), f"{where}.serve")
    if command is None and not model and not url:
        raise BenchError(f"{where} has neither a model to serve nor a command nor a url")
    if url is not None and (not isinstance(url, str) or (command is None and ("serve" in entry or "{port}" in url))):
        raise BenchError(
            f"{where}.url is the address of a server that runs, or with {{port}} of one that command starts"
        )
    if command is not None and ("serve" in entry or not isinstance(command, str)):
        raise BenchError(f"{where}: give either serve (flags of redline serve) or command (one line), not both")
    if command is not None and "{port}" not in command and (url is None or "{port}" in url):
        raise BenchError(f"{where}.command must contain {{port}}, which stands for a free port")
    if "api-key" in serve:
        raise BenchError(f"{where}.serve.api-key: put the key into {where}.api_key, which keeps it out of result files")
    asking = _asking(entry, where)
    served = entry.get("served_model") or (entry.get("model") if url and command is None else None)
    configuration = Configuration(
        name,
        str(model) if model else None,
        serve,
        command,
        health=str(entry.get("health") or "/health"),
        vocab_size=_whole(entry, "vocab_size", where),
        api_key=str(entry["api_key"]) if entry.get("api_key") else None,
        start_limit_s=_positive(entry.get("start_limit_s", 900), f"{where}.start_limit_s"),
        note=str(entry.get("note") or ""),
        url=url,
        served_model=str(served or ""),
        asking=asking,
    )
    try:
        configuration.describe()
    except BenchError as error:
        raise BenchError(f"{where}: {error}") from None
    return configuration


def _asking(entry: dict[str, Any], where: str) -> dict[str, Any]:
    """How the server is asked, as fields of a Target."""
    found = {key: entry[key] for key in _ASKING if entry.get(key) is not None}
    kinds: dict[str, tuple[type, str]] = {"ca": (str, "a file"), "extra_body": (dict, "a mapping of fields")}
    for key, value in found.items():
        kind, words = kinds.get(key, (bool, "true or false"))
        if not isinstance(value, kind):
            raise BenchError(f"{where}.{key} must be {words}, not {value!r}")
    headers = entry.get("headers") or {}
    if not isinstance(headers, dict):
        raise BenchError(f"{where}.headers must be a mapping of names to values")
    return found | {"headers": tuple((str(name), str(value)) for name, value in headers.items())}


def _flags(entry: Any, where: str) -> dict[str, Any]:
    """Flags of `redline serve` under one spelling, so that a configuration's own replace the common ones."""
    if not isinstance(entry, dict | None):
        raise BenchError(f"{where} must hold flags and their values, such as {{max-num-seqs: 16}}")
    for flag, value in (entry or {}).items():
        if any(isinstance(part, dict | list) for part in (value if isinstance(value, list) else [value])):
            raise BenchError(f"{where}.{flag} must be a single value or a list of them, not {value!r}")
    return {str(flag).replace("_", "-").removeprefix("--"): value for flag, value in (entry or {}).items()}


def _workload(entry: Any, options: SweepOptions, where: str) -> SweepWorkload:
    if not isinstance(entry, dict):
        raise BenchError(f"{where} must hold fields such as kind, input and output, not {entry!r}")
    own = {key: value for key, value in entry.items() if key in _OPTIONS}
    spec = {key: value for key, value in entry.items() if key not in _OPTIONS and key not in ("name", "preset")}
    try:
        if "preset" in entry:
            spec = read_workload(str(entry["preset"])) | spec
        spec |= _trace_fields(spec, own, options.arrivals)
        workload = make_workload(spec, _ANY_VOCABULARY)
    except BenchError as error:
        raise BenchError(f"{where}: {error}") from None
    return SweepWorkload(
        str(entry.get("name") or workload.name), spec, workload.max_tokens, _options(own, options, where)
    )


def _trace_fields(spec: dict[str, Any], own: dict[str, Any], common: Arrivals) -> dict[str, Any]:
    """Options of arrivals that are fields of the workload too: lengths come from the trace, data sets have bad rows."""
    found = {key: own[key] for key in _TRACE if key in own}
    if spec.get("kind") == "trace" and "trace" not in spec and "trace" not in found and common.trace is not None:
        found |= {"trace": common.trace, "trace_unit": common.trace_unit, "skip_bad_rows": common.skip_bad_rows}
    known = known_fields(spec)
    return {key: value for key, value in found.items() if key in known}


def _options(entry: Any, defaults: SweepOptions, where: str) -> SweepOptions:
    if not isinstance(entry, dict):
        raise BenchError(f"{where} must hold fields such as precision and max_minutes")
    _only(entry, _OPTIONS, where)
    read: dict[str, Callable[[Any, str], Any]] = {
        "precision": _precision, "search": _search, "ladder": _ladder, "limits": _limits, "rates": _rates,
    }  # fmt: skip
    changed: dict[str, Any] = {}
    for key, value in entry.items():
        if key == "rounds":
            changed[key] = _whole(entry, key, where, least=1)
        elif key in read:
            changed[key] = read[key](value, f"{where}.{key}")
        elif key not in _ARRIVALS:
            changed["window_s" if key == "window" else key] = _positive(value, f"{where}.{key}")
    if entry.keys() & _ARRIVALS:
        changed["arrivals"] = _arrivals(entry, where)
    return _checked(replace(defaults, **changed), where)


def _checked(options: SweepOptions, where: str) -> SweepOptions:
    if options.search == "first" and not options.ladder and not options.rates:
        raise BenchError(f"{where}.search: first needs a ladder, since the others are measured on nothing else")
    return options


def _rates(value: Any, where: str) -> tuple[float, ...]:
    if not isinstance(value, list) or not value:
        raise BenchError(f"{where} must be a list of request rates, not {value!r}")
    rates = tuple(sorted({_positive(rate, where) for rate in value}))
    if rates[-1] > _MOST_RATE:
        raise BenchError(f"{where} must hold rates up to {_MOST_RATE:g} requests/s, not {rates[-1]:g}")
    return rates


def _search(value: Any, where: str) -> str:
    if value not in ("all", "first"):
        raise BenchError(f"{where} must be all or first (configuration), not {value!r}")
    return str(value)


def _ladder(value: Any, where: str) -> bool | tuple[float, ...]:
    if isinstance(value, list) and value:
        return tuple(sorted({_positive(share, where) for share in value}))
    if not isinstance(value, bool):
        raise BenchError(f"{where} must be true, false or a list of shares of the lowest rate found, not {value!r}")
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
    burstiness = _positive(entry.get("burstiness", 1.0), f"{where}.burstiness")
    try:
        return Arrivals(kind, burstiness, entry.get("trace"), entry.get("trace_unit", "auto"), skip)
    except BenchError as error:
        raise BenchError(f"{where}: {error}") from None


def _limits(value: Any, where: str) -> dict[str, float]:
    known = sorted(f.name for f in fields(PointRow) if re.search(r"_p\d+_ms$", f.name))
    if not isinstance(value, dict):
        raise BenchError(f"{where} must hold columns of points.csv and their highest values, such as ttft_p99_ms: 2000")
    _only(value, known, where)
    return {column: _positive(limit, f"{where}.{column}") for column, limit in value.items()}


def _whole(entry: dict[str, Any], key: str, where: str, least: int = 2) -> int | None:
    value = entry.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise BenchError(f"{where}.{key} must be a whole number of at least {least}, not {value!r}")
    return value


def _precision(value: Any, where: str) -> float:
    text = str(value).strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if isinstance(value, bool) or not 0 < share < 1:
        raise BenchError(f"{where} must be a share such as 10% or 0.1, not {value!r}")
    return share


def _positive(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise BenchError(f"{where} must be a number above 0, not {value!r}")
    return float(value)


def _mapping(data: dict[str, Any], key: str) -> dict[Any, Any]:
    value = data.get(key)
    if not isinstance(value, dict) or not value:
        raise BenchError(f"{key} must hold at least one named entry")
    return value


def _only(entry: dict[Any, Any], known: Collection[str], where: str) -> None:
    for key in entry:
        if key not in known:
            raise BenchError(f"{where} has an unknown field {key!r}; it knows {', '.join(sorted(known))}")
