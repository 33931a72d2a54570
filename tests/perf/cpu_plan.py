"""What `make bench-cpu` runs: workloads, requests and rounds, as the environment asks; see bench_cpu.py."""

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.workloads import make_workload
from bench.workloads.arrivals import point_seed
from bench.workloads.base import RequestSpec
from engine.model.resolve import resolve_model


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    input: int
    output: int
    requests: int
    rate: float | None = None  # of arrivals over HTTP; None: all at once

    @property
    def single(self) -> bool:
        return self.requests == 1


BATCH = Workload("128/128x64", 128, 128, 64)
WORKLOADS = (
    BATCH,
    Workload("500/128x32", 500, 128, 32),
    Workload("single", 128, 128, 1),
    Workload("online-4", 128, 128, 48, rate=4.0),
    Workload("online-6", 128, 128, 48, rate=6.0),
)


@dataclass(frozen=True, slots=True)
class Plan:
    model: Path
    vocabulary: int
    rounds: int
    workloads: tuple[Workload, ...]
    cap: int | None  # requests of a workload at most

    def specs(self, workload: Workload, seed: int, output: int | None = None) -> list[RequestSpec]:
        count = workload.requests if self.cap is None else min(self.cap, workload.requests)
        kind = {"kind": "random", "input": workload.input, "output": output or workload.output}
        return make_workload(kind, self.vocabulary).requests(count, point_seed(seed, workload.name, workload.rate or 0))


def asked_workloads(known: Iterable[str]) -> tuple[str, ...]:
    """The workloads that the environment names, or all of them."""
    names = tuple(known)
    asked = tuple(filter(None, os.environ.get("WORKLOADS", "").split(",")))
    for name in asked:
        if name not in names:
            sys.exit(f"WORKLOADS={name}: choose from {', '.join(names)}")
    return asked or names


def asked_model() -> tuple[Path, int]:
    """The folder of the model that the environment names, and its vocabulary size."""
    model = resolve_model(os.environ.get("MODEL", "smollm2-135m"))
    return model, json.loads((model / "config.json").read_text())["vocab_size"]


def asked_rounds() -> int:
    return int(os.environ.get("ROUNDS", "3"))


def make_plan() -> Plan:
    known = {workload.name: workload for workload in WORKLOADS}
    workloads = asked_workloads(known)
    model, vocabulary = asked_model()
    cap = os.environ.get("REQUESTS")
    return Plan(
        model=model,
        vocabulary=vocabulary,
        rounds=asked_rounds(),
        workloads=tuple(known[name] for name in workloads),
        cap=int(cap) if cap else None,
    )
