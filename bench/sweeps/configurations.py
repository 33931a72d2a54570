"""Configurations of a sweep: the servers that it measures, and how requests are sent to each."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.measurement.nvml import Gpus, parse_gpus
from bench.target.server import RunningServer, ServerProcess, has_flag, serve_flags
from bench.target.target import Target
from bench.target.tls import tls_context
from engine.config import SIMULATED

_TARGET_FIELDS = ("ca", "insecure", "extra_body", "ignore_eos", "stream_options")  # have the same names in Target
_OF_SIMULATED = frozenset({"model", "serve", "note"})  # fields that simulated configurations may have
_FIELDS = frozenset(
    {"model", "serve", "command", "url", "health", "vocab_size", "api_key", "start_limit_s", "note"}
    | {"served_model", "headers", "energy_gpus", *_TARGET_FIELDS}
)


@dataclass(frozen=True, slots=True)
class Configuration:
    """One server to measure: `redline serve` with flags, any command line with a health URL, or a running server."""

    name: str
    model: str | None
    serve: dict[str, Any] = field(default_factory=dict)
    command: str | None = None
    health: str = "/health"
    vocab_size: int | None = None  # for servers that do not report it
    api_key: str | None = None
    start_limit_s: float = 900.0
    note: str = ""  # explains the name, in tables and figures
    url: str | None = None  # of a running server, or of the one that the command starts ({port} is its port)
    served_model: str = ""  # model name to request, if the server has several
    target_fields: dict[str, Any] = field(default_factory=dict)  # further fields of its Target
    energy_gpus: Gpus | None = None  # as of find_energy()
    own_serve: dict[str, Any] = field(default_factory=dict)  # the flags in `serve` that only this configuration has

    def of_workload(self, model: str | None, serve: dict[str, Any]) -> "Configuration":
        """The configuration for a workload with a model and flags of its own; flags of the configuration win."""
        return replace(self, model=model or self.model, serve=self.serve | serve | self.own_serve)

    @property
    def is_simulated(self) -> bool:
        """Whether it is an engine on simulated hardware, in virtual time."""
        return self.command is None and self.url is None and str(self.serve.get("device")).startswith(SIMULATED)

    @property
    def is_running(self) -> bool:
        """Whether the server runs already and is neither started nor stopped here."""
        return self.command is None and self.url is not None

    def target(self, base_url: str) -> Target:
        """The target for the server at `base_url`."""
        target = Target(base_url, self.served_model, self.api_key, **self.target_fields)
        own = self.command is None and not self.is_running
        return replace(target, insecure=True) if own and target.is_tls and target.ca is None else target

    def server(self, max_tokens: int, log: Path) -> ServerProcess | RunningServer:
        """The server, not started yet, for a workload whose largest request has `max_tokens` tokens."""
        limit = self.start_limit_s
        if self.command is None and self.url is not None:
            return RunningServer(self.url)
        if self.command is None:
            assert self.model is not None
            return ServerProcess.redline(self.model, self.arguments(max_tokens), log, start_limit_s=limit)
        url = (self.url or "http://127.0.0.1:{port}").rstrip("/").removesuffix("/v1")
        target = self.target(url.replace("{port}", "1"))
        verify = tls_context(target.ca, insecure=target.insecure) if target.is_tls else True
        return ServerProcess(
            self.command_line(max_tokens), log, url=url, health=self.health, start_limit_s=limit, verify=verify,
            headers=target.all_headers(),
        )  # fmt: skip

    def arguments(self, max_tokens: int) -> list[str]:
        """Flags of `redline serve` for a workload whose largest request has `max_tokens` tokens."""
        flags = serve_flags(self.serve)
        if not has_flag(flags, "--max-model-len"):
            flags += ["--max-model-len", str(model_len(max_tokens))]
        return [*flags, "--api-key", self.api_key] if self.api_key else flags

    def command_line(self, max_tokens: int) -> str:
        """The `command` with everything filled in except the port."""
        assert self.command is not None
        filled = self.command.replace("{max_model_len}", str(model_len(max_tokens)))
        return filled.replace("{model}", self.model or "")

    def describe(self) -> dict[str, Any]:
        """Plain data for result files, without the key."""
        known: dict[str, Any] = {"model": self.model} | ({"note": self.note} if self.note else {})
        target = self.target((self.url or "http://127.0.0.1").replace("{port}", "1"))
        known |= {"requests": target.described()} if target.described() else {}
        if self.is_running:
            return known | {"url": target.base_url}
        if self.command is None:
            return known | {"serve": dict(self.serve)}
        return known | {"command": self.command.replace(self.api_key, "***") if self.api_key else self.command}

    def shown(self, max_tokens: int) -> str:
        """The command line, or the URL of a running server, without the key."""
        if self.is_running:
            return self.target(str(self.url)).base_url
        if self.command is not None:
            line = self.command_line(max_tokens)
        else:
            line = " ".join(["redline serve", str(self.model), *self.arguments(max_tokens)])
        return line.replace(self.api_key, "***") if self.api_key else line


def model_len(max_tokens: int) -> int:
    """A --max-model-len with 10 % to spare above the longest request."""
    return math.ceil(round(1.1 * max_tokens, 6))


def read_configuration(name: str, entry: Any, data: dict[str, Any], *, needs_model: bool = True) -> Configuration:
    """Read one configuration; `needs_model` is False if every workload has a model of its own."""
    where = f"configurations.{name}"
    entry = {} if entry is None else entry
    if not isinstance(entry, dict):
        raise BenchError(f"{where} must have fields such as serve or command, not {entry!r}")
    only_known(entry, _FIELDS, where)
    command, url = entry.get("command"), entry.get("url")
    model = entry.get("model", None if url and command is None else data.get("model"))
    serve = {} if command is not None or url else flags_of(data.get("serve"), "serve")
    own_serve = flags_of(entry.get("serve"), f"{where}.serve")
    serve |= own_serve
    if command is None and not model and not url and needs_model:
        raise BenchError(f"{where} needs one of model, command or url")
    if url is not None and (not isinstance(url, str) or (command is None and ("serve" in entry or "{port}" in url))):
        raise BenchError(
            f"{where}.url must be the address of a running server, or contain {{port}} together with command"
        )
    if command is not None and ("serve" in entry or not isinstance(command, str)):
        raise BenchError(f"{where}: use serve (flags of redline serve) or command (one line), not both")
    if command is not None and "{port}" not in command and (url is None or "{port}" in url):
        raise BenchError(f"{where}.command must contain {{port}}, which stands for a free port")
    if "api-key" in serve:
        raise BenchError(f"{where}.serve.api-key: put the key into {where}.api_key, which keeps it out of result files")
    served = entry.get("served_model") or (entry.get("model") if url and command is None else None)
    configuration = Configuration(
        name,
        str(model) if model else None,
        serve,
        command,
        health=str(entry.get("health") or "/health"),
        vocab_size=integer(entry, "vocab_size", where),
        api_key=str(entry["api_key"]) if entry.get("api_key") else None,
        start_limit_s=positive(entry.get("start_limit_s", 900), f"{where}.start_limit_s"),
        note=str(entry.get("note") or ""),
        url=url,
        served_model=str(served or ""),
        target_fields=_target_fields(entry, where),
        energy_gpus=_gpus(entry.get("energy_gpus"), f"{where}.energy_gpus"),
        own_serve=own_serve,
    )
    if configuration.is_simulated:
        for key in sorted(entry.keys() - _OF_SIMULATED):
            raise BenchError(f"{where}.{key} has no meaning on simulated hardware: leave it out")
    try:
        configuration.describe()
    except BenchError as error:
        raise BenchError(f"{where}: {error}") from None
    return configuration


def _gpus(value: Any, where: str) -> Gpus | None:
    if value is None:
        return None
    words = value if isinstance(value, list) else [value]
    try:
        return parse_gpus(",".join(str(word) for word in words))
    except ValueError:
        raise BenchError(f"{where} must be all, none, or numbers of GPUs such as [0, 1], not {value!r}") from None


def _target_fields(entry: dict[str, Any], where: str) -> dict[str, Any]:
    """How requests are sent to the server, as fields of a Target."""
    found = {key: entry[key] for key in _TARGET_FIELDS if entry.get(key) is not None}
    kinds: dict[str, tuple[type, str]] = {"ca": (str, "a file"), "extra_body": (dict, "a mapping of fields")}
    for key, value in found.items():
        kind, words = kinds.get(key, (bool, "true or false"))
        if not isinstance(value, kind):
            raise BenchError(f"{where}.{key} must be {words}, not {value!r}")
    headers = entry.get("headers") or {}
    if not isinstance(headers, dict):
        raise BenchError(f"{where}.headers must be a mapping of names to values")
    return found | {"headers": tuple((str(name), str(value)) for name, value in headers.items())}


def flags_of(entry: Any, where: str) -> dict[str, Any]:
    """Flags of `redline serve` in one spelling, so that a configuration's flags replace the common ones."""
    if not isinstance(entry, dict | None):
        raise BenchError(f"{where} must have flags and their values, such as {{max-num-seqs: 16}}")
    for flag, value in (entry or {}).items():
        if any(isinstance(part, dict | list) for part in (value if isinstance(value, list) else [value])):
            raise BenchError(f"{where}.{flag} must be a single value or a list of them, not {value!r}")
    return {str(flag).replace("_", "-").removeprefix("--"): value for flag, value in (entry or {}).items()}


def integer(entry: dict[str, Any], key: str, where: str, least: int = 2) -> int | None:
    value = entry.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise BenchError(f"{where}.{key} must be an integer of at least {least}, not {value!r}")
    return value


def positive(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise BenchError(f"{where} must be a number above 0, not {value!r}")
    return float(value)


def only_known(entry: dict[Any, Any], known: Collection[str], where: str) -> None:
    for key in entry:
        if key not in known:
            raise BenchError(f"{where} has an unknown field {key!r}; known fields: {', '.join(sorted(known))}")
