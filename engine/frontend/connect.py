"""Makes a front end's client of its engine: of a single core, or of all replicas behind a router."""

import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias

import msgspec

from engine.clock import MonotonicClock
from engine.frontend.client import CoreClient
from engine.frontend.router import Replica, Router
from engine.frontend.routing import Lengths
from engine.frontend.stats import Board
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.transport import ZmqTransport
from engine.messages import Ready

EngineClient: TypeAlias = CoreClient | Router


class CoreAddress(msgspec.Struct):
    """The addresses at which one front end reaches a core, and the core's report."""

    ready: Ready
    to_core: str
    from_core: str


def connect(
    cores: Sequence[CoreAddress],
    tokenizer: Tokenizer,
    *,
    front_end: int = 0,
    first_sequence: int = 1,
    seed: int = 0,
    routing: str = "prefix",
    boards: Sequence[Board] = (),
) -> EngineClient:
    """Make a front end's client; `open()` it inside an event loop.

    Args:
        first_sequence: number of its first request.
        boards: the counters that the front ends of each core share; none for the only front end.
    """
    clock, numbers, lengths = MonotonicClock(), itertools.count(first_sequence), Lengths()
    replicas = []
    for number, core in enumerate(cores):
        board = boards[number] if boards else None
        transport = ZmqTransport(core.to_core, core.from_core)
        # Numbers are shared, so that a request's seed does not depend on its replica.
        settings: dict[str, Any] = {"front_end": front_end, "seed": seed, "board": board, "numbers": numbers}
        if len(cores) == 1:
            return CoreClient(core.ready, tokenizer, transport, clock, **settings)
        replicas.append(Replica(number, lengths, core.ready, tokenizer, transport, clock, **settings))
    return Router(replicas, routing, seed + front_end)
