"""Workloads: what is sent."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.errors import BenchError
from bench.workloads.base import Encode, RequestSpec, Workload
from bench.workloads.images import SyntheticImages
from bench.workloads.texts import JsonLines, ShareGPT
from bench.workloads.tokens import RandomTokens, SharedPrefix
from bench.workloads.trace_lengths import TraceLengths
from bench.workloads.turns import MultiTurn
from bench.workloads.vision import MMMUPro, VisionArena

__all__ = [
    "ANY_VOCABULARY", "Encode", "RequestSpec", "Workload", "has_exact_lengths", "known_fields", "make_workload",
    "needs_vocabulary",
]  # fmt: skip


ANY_VOCABULARY = 32_000  # vocabulary size for a workload of which only name and lengths are used


@dataclass(frozen=True, slots=True)
class WorkloadKind:
    make: Callable[..., Workload]
    required: frozenset[str]
    optional: frozenset[str]
    vocabulary: bool = False  # needs the vocabulary size, for random tokens
    encode: bool = False  # needs a tokenizer, for texts
    exact: bool = True  # max_tokens is exact, not an estimate


def _fields(text: str) -> frozenset[str]:
    return frozenset(text.split())


WORKLOAD_KINDS: dict[str, WorkloadKind] = {
    "random": WorkloadKind(RandomTokens, _fields("input output"), _fields(""), vocabulary=True),
    "shared-prefix": WorkloadKind(SharedPrefix, _fields("prefix input output"), _fields("prefixes"), vocabulary=True),
    "multi-turn": WorkloadKind(MultiTurn, _fields("input output"), _fields("turns conversations"), vocabulary=True),
    "trace": WorkloadKind(
        TraceLengths, _fields("trace"), _fields("trace_unit skip_bad_rows input output"), vocabulary=True
    ),
    "sharegpt": WorkloadKind(
        ShareGPT, _fields("dataset"), _fields("max_input max_tokens rows fresh skip_bad_rows"), encode=True
    ),
    "jsonl": WorkloadKind(JsonLines, _fields("dataset"), _fields("output rows fresh skip_bad_rows"), exact=False),
    "visionarena": WorkloadKind(
        VisionArena, _fields("dataset"), _fields("output rows fresh skip_bad_rows subset split"), exact=False
    ),
    "mmmu-pro": WorkloadKind(
        MMMUPro, _fields("dataset"), _fields("output rows fresh skip_bad_rows subset split repeat"), exact=False
    ),
    "images": WorkloadKind(
        SyntheticImages, _fields(""), _fields("images image_size input output image_format repeat"), exact=False
    ),
}  # fmt: skip


def make_workload(spec: dict[str, Any], vocab_size: int | None, encode: Encode | None = None) -> Workload:
    """Build a workload from plain data; raises BenchError naming the field that is wrong.

    {"kind": "random", "input": 500, "output": 2000}, where a length is a number or [low, high];
    {"kind": "shared-prefix", "prefix": 448, "input": 64, "output": 32, "prefixes": 4};
    {"kind": "multi-turn", "input": 200, "output": 100, "turns": 4, "conversations": 8};
    {"kind": "trace", "trace": "lengths.csv"};
    {"kind": "images", "images": [1, 4], "image_size": "512x512,1275x1650", "input": 64, "output": 64};
    {"kind": "sharegpt", "dataset": "file.json"}, and the same for jsonl, visionarena and mmmu-pro.
    `vocab_size` is needed for random tokens (see needs_vocabulary()), `encode` for sharegpt when it is first used.
    """
    kind = _kind(spec)
    known, name = WORKLOAD_KINDS[kind], kind
    fields = {key: value for key, value in spec.items() if key != "kind"}
    for missing in sorted(known.required - fields.keys() - {"dataset"}):  # find_data() reports a missing data set
        raise BenchError(f"workload {name}: the field {missing} is missing")
    for extra in sorted(fields.keys() - known.required - known.optional, key=str):
        raise BenchError(
            f"workload {name}: unknown field {extra}; known fields: "
            f"{', '.join(sorted(known.required | known.optional))}"
        )
    if known.vocabulary:
        fields["vocab_size"] = vocab_size
    if known.encode:
        fields["encode"] = encode
    return known.make(**fields)


def needs_vocabulary(spec: dict[str, Any]) -> bool:
    """Whether make_workload() needs the vocabulary size for `spec`."""
    return WORKLOAD_KINDS[_kind(spec)].vocabulary


def has_exact_lengths(workload: Workload) -> bool:
    """Whether `workload.max_tokens` is exact; for texts and images it is an estimate."""
    return WORKLOAD_KINDS[_kind(workload.describe())].exact


def known_fields(spec: dict[str, Any]) -> frozenset[str]:
    """The fields that a workload of this kind takes."""
    known = WORKLOAD_KINDS[_kind(spec)]
    return known.required | known.optional


def _kind(spec: Any) -> str:
    if not isinstance(spec, dict):
        raise BenchError(f"a workload must have fields such as kind, input and output, not {spec!r}")
    kind = spec.get("kind")
    if not isinstance(kind, str) or kind not in WORKLOAD_KINDS:
        raise BenchError(f"workload: unknown kind {kind!r}; choose from {', '.join(WORKLOAD_KINDS)}")
    return kind
