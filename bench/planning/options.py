"""What a plan is asked for, and the deployments that come into question."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.workloads.arrivals import Arrivals


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """The load to serve, and the limits of its latencies."""

    model: str
    workload: dict[str, Any]  # as in make_workload()
    rate: float  # requests/s
    limits: dict[str, float]  # column of PointRecord -> highest allowed value
    flags: tuple[str, ...] = ()  # of `redline serve`
    prices: dict[str, float] = field(default_factory=dict)  # hardware -> US dollars for an hour of one GPU
    precision: float = 0.1
    seed: int = 0
    arrivals: Arrivals = field(default_factory=Arrivals)

    def digest(self, product: str) -> str:
        """A hash of what decides the rows besides the hardware: everything but prices, and the product's version."""
        data = asdict(self) | {"prices": None, "product": product}
        return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica: one model on `tp` GPUs of one kind."""

    hardware: str
    tp: int

    @property
    def name(self) -> str:
        return f"{self.hardware} TP{self.tp}"

    def flags(self, request: PlanRequest) -> list[str]:
        """Of `redline serve`."""
        return [*request.flags, "--device", f"sim:{self.hardware}", "--tensor-parallel-size", str(self.tp)]
