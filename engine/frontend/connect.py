"""Makes a front end's client: a CoreClient for a single core, or a Router with one for each replica."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from engine.clock import MonotonicClock
from engine.frontend.core_client import CoreClient
from engine.frontend.disaggregation import DisaggregatedClient, DisaggregatedRouter
from engine.frontend.front_end_stats import Boards, MMCounters
from engine.frontend.mm_pipeline import MMOptions, MMPipeline
from engine.frontend.replica_events import (
    DrainCanceled,
    DrainTimeout,
    ReplicaDraining,
    ReplicaEvent,
    ReplicaLost,
    ReplicaRemoved,
    ReplicaStarting,
)
from engine.frontend.router import Router
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.transport import CoreAddress
from engine.messages import Ready

EngineClient: TypeAlias = CoreClient | Router


class ClientMaker:
    """Makes the clients of one front end, one for each core."""

    def __init__(
        self,
        ready: Ready,
        tokenizer: Tokenizer,
        *,
        front_end: int = 0,
        first_sequence: int = 1,
        seed: int = 0,
        boards: Boards | None = None,
        mm: MMOptions | None = None,
    ):
        """Arguments as of `connect`; `ready` is the report of one of the cores."""
        self._tokenizer = tokenizer
        self._front_end = front_end
        self._seed = seed
        self._boards = boards
        self._clock = MonotonicClock()
        self._numbers = itertools.count(first_sequence)  # shared: a request's seed does not depend on its replica
        self._inputs: MMPipeline | None = None
        if mm is not None and ready.mm is not None:
            counters = MMCounters() if boards is None else boards[0].stats[front_end].inputs
            front_ends = 1 if boards is None else boards.front_ends
            self._inputs = MMPipeline.make(
                ready.mm, mm, counters, front_end=front_end, front_ends=front_ends, first_sequence=first_sequence
            )

    def make(self, core: CoreAddress, replica: int | None) -> CoreClient:
        """The client of a core; `replica` None: there is one core."""
        client_type = DisaggregatedClient if core.ready.role else CoreClient
        return client_type(
            core.ready,
            self._tokenizer,
            core.make_transport(),
            self._clock,
            front_end=self._front_end,
            seed=self._seed,
            board=None if self._boards is None else self._boards[replica or 0],
            numbers=self._numbers,
            replica=replica,
            inputs=self._inputs,
        )


def router_type(ready: Ready) -> type[Router]:
    """The router of an engine, by the report of one of its cores."""
    return DisaggregatedRouter if ready.role else Router


class SupervisedClient:
    """The client of a front end of a server, whose replicas come and go (see `engine.api.replica_set`)."""

    def __init__(self, maker: ClientMaker, cores: Mapping[int, CoreAddress], routing: str, seed: int):
        """`cores` by replica. Those that are gone have no address; an event must follow for them."""
        self._maker = maker
        alone = len(cores) == 1
        clients = [maker.make(cores[number], None if alone and not number else number) for number in sorted(cores)]
        self.router = router_type(clients[0].ready)(clients, routing, seed, supervised=True)

    def apply(self, event: ReplicaEvent) -> None:
        """A replica came or went; called inside the event loop."""
        router, replica = self.router, event.replica
        match event:
            case ReplicaStarting():
                router.core_starting(replica)
            case ReplicaLost():
                router.core_lost(replica, event.cause, restarting=event.restarting)
            case ReplicaDraining():
                router.drain(replica, event.drain)
            case DrainTimeout():
                router.end_drain(replica, event.cause)
            case DrainCanceled():
                router.cancel_drain(replica)
            case ReplicaRemoved():
                router.core_removed(replica)
            case _ if router.knows(replica):
                router.core_up(replica, event.core.ready, event.core.make_transport())
            case _:
                router.core_added(self._maker.make(event.core, replica))


def connect(
    cores: Sequence[CoreAddress],
    tokenizer: Tokenizer,
    *,
    seed: int = 0,
    routing: str = "prefix",
    mm: MMOptions | None = None,
) -> EngineClient:
    """Make the client of the only front end of an engine whose replicas stay; `open()` it inside an event loop.

    Args:
        mm: how multimodal inputs are prepared; None: they aren't, here.
    """
    maker = ClientMaker(cores[0].ready, tokenizer, seed=seed, mm=mm)
    if len(cores) == 1:
        return maker.make(cores[0], None)
    clients = [maker.make(core, number) for number, core in enumerate(cores)]
    return router_type(cores[0].ready)(clients, routing, seed)


def supervise(
    cores: Mapping[int, CoreAddress],
    tokenizer: Tokenizer,
    boards: Boards,
    *,
    front_end: int = 0,
    first_sequence: int = 1,
    seed: int = 0,
    routing: str = "prefix",
    mm: MMOptions | None = None,
) -> SupervisedClient:
    """Make the client of a front end of a server; open its router inside an event loop.

    Args:
        cores: by replica.
        boards: the counters that the front ends share.
        front_end: number of the API process.
        first_sequence: number of its first request.
        mm: how multimodal inputs are prepared; None: they aren't, here.
    """
    maker = ClientMaker(
        next(iter(cores.values())).ready,
        tokenizer,
        front_end=front_end,
        first_sequence=first_sequence,
        seed=seed,
        boards=boards,
        mm=mm,
    )
    return SupervisedClient(maker, cores, routing, seed + front_end)
