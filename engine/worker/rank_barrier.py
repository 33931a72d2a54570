"""The call that ends once every rank has done all that came before it. Only rank 0 reports results otherwise."""

from collections.abc import Callable
from typing import Any

from engine.kv_transfer import WAIT_FOR_RANKS
from engine.worker.adapter_manager import AdapterSharding


def barrier_calls(sharding: AdapterSharding | None) -> dict[str, Callable[..., Any]]:
    """The call by its method, for the runner; `sharding` None: there is one rank."""

    def wait_for_ranks() -> None:
        if sharding is not None:
            sharding.part.group.smallest(0)

    return {WAIT_FOR_RANKS: wait_for_ranks}
