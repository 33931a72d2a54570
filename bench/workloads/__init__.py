"""Workloads: what is sent, apart from when."""

from collections.abc import Callable
from typing import Any

from bench.errors import BenchError
from bench.workloads.base import RequestSpec, Workload
from bench.workloads.tokens import RandomTokens, SharedPrefix

__all__ = ["RequestSpec", "Workload", "make_workload"]

_KINDS: dict[str, Callable[..., Workload]] = {"random": RandomTokens, "shared-prefix": SharedPrefix}
_FIELDS: dict[str, tuple[frozenset[str], frozenset[str]]] = {  # required, optional
    "random": (frozenset({"input", "output"}), frozenset()),
    "shared-prefix": (frozenset({"prefix", "input", "output"}), frozenset({"prefixes"})),
}


def make_workload(spec: dict[str, Any], vocab_size: int) -> Workload:
    """Build a workload from plain data; raises BenchError naming the field that is wrong.

    {"kind": "random", "input": 500, "output": 2000}, where a length is a number or [low, high];
    {"kind": "shared-prefix", "prefix": 448, "input": 64, "output": 32, "prefixes": 4}.
    """
    if not isinstance(spec, dict):
        raise BenchError(f"workload: expected fields such as kind, input and output, not {spec!r}")
    kind = spec.get("kind")
    if kind not in _KINDS:
        raise BenchError(f"workload: kind is {kind!r}; choose from {', '.join(_KINDS)}")
    required, optional = _FIELDS[kind]
    fields = {name: value for name, value in spec.items() if name != "kind"}
    for name in sorted(required - fields.keys()):
        raise BenchError(f"workload {kind}: the field {name} is missing")
    for name in sorted(fields.keys() - required - optional, key=str):
        raise BenchError(f"workload {kind}: unknown field {name}; it knows {', '.join(sorted(required | optional))}")
    return _KINDS[kind](vocab_size=vocab_size, **fields)
