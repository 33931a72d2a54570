"""The call that ends once every rank has done all that came before it. Only one rank reports results otherwise."""

from collections.abc import Callable
from typing import Any

from engine.kv_transfer import WAIT_FOR_RANKS
from engine.worker.adapter_manager import AdapterRanks


def barrier_calls(ranks: AdapterRanks | None) -> dict[str, Callable[..., Any]]:
    """The call by its method, for the runner; `ranks` None: there is one rank."""

    def wait_for_ranks() -> None:
        if ranks is not None:
            ranks.wait()

    return {WAIT_FOR_RANKS: wait_for_ranks}
