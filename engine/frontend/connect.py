"""Makes a front end's client: a CoreClient for a single core, or a Router with one for each replica."""

import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias

import msgspec

from engine.clock import MonotonicClock
from engine.frontend.core_client import CoreClient
from engine.frontend.front_end_stats import Board, MMCounters
from engine.frontend.mm_pipeline import MMOptions, MMPipeline
from engine.frontend.router import Router
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
    mm: MMOptions | None = None,
) -> EngineClient:
    """Make a front end's client; `open()` it inside an event loop.

    Args:
        first_sequence: number of its first request.
        boards: the counters that the front ends of each core share; none for the only front end.
        mm: how multimodal inputs are prepared; None: they aren't, here.
    """
    clock, numbers = MonotonicClock(), itertools.count(first_sequence)
    clients, inputs = [], None
    spec = cores[0].ready.mm
    if mm is not None and spec is not None:
        counters = boards[0].stats[front_end].inputs if boards else MMCounters()
        front_ends = len(boards[0].stats) if boards else 1
        inputs = MMPipeline.make(
            spec, mm, counters, front_end=front_end, front_ends=front_ends, first_sequence=first_sequence
        )
    for number, core in enumerate(cores):
        board = boards[number] if boards else None
        transport = ZmqTransport(core.to_core, core.from_core)
        # Numbers are shared, so that a request's seed does not depend on its replica.
        settings: dict[str, Any] = {"front_end": front_end, "seed": seed, "board": board, "numbers": numbers}
        settings["inputs"] = inputs
        replica = number if len(cores) > 1 else None
        clients.append(CoreClient(core.ready, tokenizer, transport, clock, replica=replica, **settings))
    return clients[0] if len(clients) == 1 else Router(clients, routing, seed + front_end)


def reconnect(client: EngineClient, replica: int, core: CoreAddress) -> None:
    """Have a client use the new core of a replica whose core was lost; called inside its event loop."""
    client.core_up(replica, core.ready, ZmqTransport(core.to_core, core.from_core))
