"""Several replicas as one engine: a Router offers the methods of a CoreClient and has a CoreClient for each replica.

A stream stays on the replica that it was assigned to. If that replica dies before the stream has produced output, the
stream is retried once on another replica; otherwise it fails with the cause. The other replicas continue to serve, and
the server ends with the last one.

A server supervises its replicas: it starts those that died again, and adds and drains others. Requests that no replica
can take meanwhile are held until one serves.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from engine.errors import EngineDeadError, RedlineError, cause_of
from engine.frontend.core_client import NO_OPTIONS, STOPPED, UNKNOWN_ORIGIN, CoreClient
from engine.frontend.feature_cache import PromptInputs
from engine.frontend.front_end_stats import FrontEndStats
from engine.frontend.held_requests import HeldRequests
from engine.frontend.listener import ClientListener
from engine.frontend.prompts import Prompt, Text
from engine.frontend.replica_calls import ReplicaCalls
from engine.frontend.replica_tracker import ReplicaTracker
from engine.frontend.routing import (
    Candidate,
    OutputLengthEstimate,
    cached_tokens,
    make_routing_policy,
    prompt_block_hashes,
)
from engine.frontend.sampling_params import SamplingParams
from engine.frontend.simulated import refused_grammar
from engine.frontend.streams import Origin, RequestOptions, RequestStream
from engine.frontend.transport import Transport
from engine.grammar import Grammar, GrammarCheck
from engine.messages import Ready

log = logging.getLogger("redline.router")

STARTING = "no replica serves yet"


def _ignore(_replica: int, _drain: int) -> None:
    """The owner of a router whose replicas are never drained."""


class Router:
    """Several replicas of one engine, seen as one; lives in one event loop as its clients do."""

    tracker_type = ReplicaTracker

    def __init__(self, clients: Sequence[CoreClient], routing: str, seed: int = 0, *, supervised: bool = False):
        """Make a router; `open` starts it.

        Args:
            clients: one for each replica, in the order of their numbers.
            routing: one of `engine.config.ROUTINGS`.
            seed: of random routing.
            supervised: whether the owner reports which replicas are started again, so that requests may wait for them.
        """
        first = clients[0]
        self.ready = first.ready  # all replicas have the same configuration
        self.tokenizer = first.tokenizer
        self.inputs = first.inputs
        self.clock = first.clock
        self.alone = first.alone
        self.routing = routing
        self.dead: str | None = None  # the cause, once no replica is left
        self.listener = ClientListener()
        # Called with a draining replica that has no streams here, and the number of its drain.
        self.on_drained: Callable[[int, int], None] = _ignore
        self._supervised = supervised
        self._output_length = OutputLengthEstimate()
        self._trackers = {client.replica: self.tracker_type(self, client, self._output_length) for client in clients}
        self._starting: set[int] = set()  # numbers of replicas that have never served
        self._held = HeldRequests(first.stats)
        self._last_death = ""
        self._policy = make_routing_policy(routing, seed)
        self._calls = ReplicaCalls(lambda: [tracker.client for tracker in self._living()], self._why_none)
        self._is_open = self._closing = False

    def open(self, listener: ClientListener | None = None) -> None:
        """Start receiving messages; called inside the event loop that will use the router."""
        if listener is not None:
            self.listener = listener
        for tracker in self._trackers.values():
            tracker.client.open(tracker)
        self._is_open = True

    def close(self) -> None:
        """Stop receiving messages. Streams that are still live fail; `core_died` is not called."""
        self._closing = True
        self.fail_all(STOPPED)
        for client in self.cores:
            client.close()

    @property
    def trackers(self) -> list[ReplicaTracker]:
        """All replicas by number, also those that are gone."""
        return [self._trackers[number] for number in sorted(self._trackers)]

    @property
    def cores(self) -> tuple[CoreClient, ...]:
        """The clients of all replicas, also of those that are gone, whose counters they keep."""
        return tuple(tracker.client for tracker in self.trackers)

    @property
    def replicas(self) -> tuple[CoreClient, ...]:
        """The clients of the replicas, but for those that were removed; none of a server that never had two."""
        if len(self._trackers.keys() | self._starting) < 2:
            return ()
        return tuple(tracker.client for tracker in self.trackers if not tracker.removed)

    # ------------------------------------------------------------------------------------------------------- requests

    def add_request(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        options: RequestOptions = NO_OPTIONS,
        origin: Origin = UNKNOWN_ORIGIN,
        inputs: Sequence[PromptInputs] = (),
        second_segments: Sequence[int] = (),
    ) -> RequestStream:
        """Start `params.n` outputs for each prompt, all on one replica; see `CoreClient.add_request`."""
        if self.dead is not None:
            raise EngineDeadError(self.dead)
        self.cores[0].check_fields(prompts, params, options.priority)
        assert len(inputs) in (0, len(prompts)), "inputs are given for all prompts or for none"
        stream = RequestStream(prompts, params, self._held, self.clock.now(), origin, options, inputs, second_segments)
        self._submit(stream)
        return stream

    def check_prompt(self, prompt: list[int]) -> None:
        """See `CoreClient.check_prompt`."""
        self.cores[0].check_prompt(prompt)

    @property
    def serving(self) -> list[CoreClient]:
        """The clients of the replicas that take requests."""
        return [tracker.client for tracker in self.trackers if tracker.takes_requests]

    def _submit(self, stream: RequestStream) -> None:
        """Assign a stream to a replica, or hold it until there is one."""
        able = self._able([tracker for tracker in self.trackers if tracker.takes_requests])
        if able:
            self._route(stream, able)
        else:
            self._held.add(stream)

    def _able(self, serving: Sequence[ReplicaTracker]) -> Sequence[ReplicaTracker]:
        """Those of the replicas that take requests to which the next one may go."""
        return responsive(serving)

    def _route(self, stream: RequestStream, able: Sequence[ReplicaTracker]) -> None:
        """Assign a stream to the replica that the routing policy chooses."""
        size, lengths = self.ready.block_size, stream.prompt_lengths
        hashes: list[list[bytes]] = [[] for _ in lengths]
        if self._policy.by_prefix and self.ready.prefix_caching and len(self._trackers) > 1:
            inputs = stream.inputs or [()] * len(lengths)
            hashes = [
                [] if isinstance(one, Text) else prompt_block_hashes(one, stream.options, size, mm_inputs)
                for one, mm_inputs in zip(stream.prompts, inputs, strict=True)
            ]
        # A request for prompt logprobs does not read the prefix cache.
        reads = stream.params.prompt_logprobs is None
        cached = [cached_tokens(hashes, lengths, one.prefixes, size) if reads else [0] * len(lengths) for one in able]
        position = self._policy.choose(
            [
                Candidate(one.tokens_left(), sum(tokens), one.assigned_tokens)
                for one, tokens in zip(able, cached, strict=True)
            ]
        )
        chosen = able[position]
        chosen.assign(stream, cached[position])
        for blocks in hashes:
            chosen.prefixes.record(blocks)

    # ------------------------------------------------------------------------------------------------------- utilities

    async def call_utility(self, method: str, **arguments: Any) -> Any:
        """Call a utility of all replicas. Raises RedlineError if one fails; adapters are then as before on all."""
        if method == "adapters":  # a replica that hangs can't answer
            results = await self._calls.call_responsive(method, arguments)
            return {name: path for name, path in results[0].items() if all(name in one for one in results)}
        try:
            results = await self._calls.call_all(method, arguments)
        finally:
            if method == "reset_prefix_cache":
                for tracker in self._trackers.values():
                    tracker.prefixes.clear()
        return sum(results) if method == "reset_prefix_cache" else results[0]

    async def check_grammar(self, grammar: Grammar) -> str:
        """See `CoreClient.check_grammar`. All replicas compile it, since each of them may get the request."""
        if refused := refused_grammar(self.ready):
            return refused
        while self.unavailable:  # as the request itself would
            await self._held.wait()
        arguments = {"kind": grammar.kind, "text": grammar.text}
        answers = await self._calls.call_responsive("check_grammar", arguments)
        checks = msgspec.convert(answers, list[GrammarCheck])
        self.stats.count_grammar([check.compile_s for check in checks])  # the stats are sums over replicas
        return max(check.cause for check in checks)

    # ----------------------------------------------------------------------------------------------------------- state

    @property
    def stats(self) -> FrontEndStats:
        """Where this front end counts what happens to requests before they reach a replica."""
        return self.cores[0].stats

    @property
    def total_stats(self) -> FrontEndStats:
        """The stats of all replicas and front ends together, now."""
        dead = [client.dead is not None for client in self.cores]
        return FrontEndStats.sum_replicas([client.total_stats for client in self.cores], dead)

    @property
    def hung(self) -> str:
        """The cause, while no replica steps."""
        living = [tracker for tracker in self.trackers if tracker.takes_requests]
        return living[0].client.hung if living and all(one.client.hung for one in living) else ""

    @property
    def unavailable(self) -> str:
        """The cause, while no replica takes requests and some are being started."""
        return "" if self.dead is not None or self.serving else self._last_death or STARTING

    def replica_states(self) -> list[dict[str, Any]]:
        """The state of each replica by number, see `ReplicaTracker.health`; none of a server that never had two."""
        if not self.replicas and not self._starting:
            return []
        states = {number: one.health() for number, one in self._trackers.items() if not one.removed}
        states |= {number: {"replica": number, "status": "starting"} for number in self._starting}
        return [states[number] for number in sorted(states)]

    def _living(self) -> list[ReplicaTracker]:
        """The replicas that are alive. Raises EngineDeadError if none is left."""
        if self.dead is not None:
            raise EngineDeadError(self.dead)
        return [tracker for tracker in self.trackers if tracker.client.dead is None]

    def _why_none(self) -> str:
        return self.dead or self.unavailable or "the replicas ended meanwhile"

    # ----------------------------------------------------------------------------------- replicas that come and go

    def core_starting(self, replica: int) -> None:
        """A replica is added: its core is being started."""
        self._starting.add(replica)

    def knows(self, replica: int) -> bool:
        """Whether the replica has served before."""
        return replica in self._trackers

    def core_added(self, client: CoreClient) -> None:
        """A replica serves for the first time."""
        self._starting.discard(client.replica)
        tracker = self._trackers[client.replica] = self.tracker_type(self, client, self._output_length)
        for number, one in self._trackers.items():
            one.client.name = f"replica {number}"
        if self._is_open:
            client.open(tracker)
        self._held.submit_all(self._submit)

    def core_up(self, replica: int, ready: Ready, transport: Transport) -> None:
        """A replica has a new core: it gets requests again, and its prefix cache is empty."""
        self._starting.discard(replica)
        tracker = self._trackers[replica]
        tracker.client.core_up(replica, ready, transport)
        tracker.core_replaced()
        self.dead = None
        self._held.submit_all(self._submit)

    def core_lost(self, replica: int, cause: str, *, restarting: bool = False) -> None:
        """A replica is gone; `replica_died` follows. `restarting`: its core is started again."""
        tracker = self._trackers[replica]
        tracker.restarting = restarting
        tracker.client.core_lost(replica, cause)
        self._end_without_replicas(tracker.client.dead or cause)

    def core_removed(self, replica: int) -> None:
        """A replica was drained, or could not be started."""
        self._starting.discard(replica)
        tracker = self._trackers.get(replica)
        if tracker is not None:
            tracker.removed, tracker.restarting = True, False
            tracker.client.core_removed()

    def drain(self, replica: int, drain: int) -> None:
        """Give a replica no more requests; `on_drained` is called once it has no streams here."""
        tracker = self._trackers[replica]
        tracker.drain = drain
        self._check_drained(tracker)

    def end_drain(self, replica: int, cause: str) -> None:
        """The time of a drain is up: streams without output move to other replicas, the others fail with the cause."""
        tracker = self._trackers[replica]
        if not tracker.draining or tracker.client.dead is not None:
            return
        streams = tracker.client.streams()
        moved = sum(self._move(tracker, stream, retry=False) for stream in streams if stream.has_no_output)
        ended = tracker.client.end_streams(EngineDeadError(cause))
        self.stats.count_event("drain_timeout", ended)
        log.warning("%s has no more time: moved requests: %d, ended outputs: %d", tracker.client.name, moved, ended)
        if not ended:
            self._check_drained(tracker)

    def cancel_drain(self, replica: int) -> None:
        """Give a draining replica requests again."""
        self._trackers[replica].drain = 0
        self._held.submit_all(self._submit)

    def replica_drained(self, tracker: ReplicaTracker) -> None:
        """A draining replica has no streams here any longer."""
        self.on_drained(tracker.client.replica, tracker.drain)

    def _check_drained(self, tracker: ReplicaTracker) -> None:
        if not tracker.client.num_live:
            self.replica_drained(tracker)

    # --------------------------------------------------------------------------------------------------------- the end

    def core_lost_threadsafe(self, replica: int, cause: str) -> None:
        """`core_lost`, from any thread; for `Engine.watch`."""
        self._trackers[replica].client.core_lost_threadsafe(replica, cause)

    def fail_all(self, cause: str) -> None:
        """Fail all streams and calls of all replicas, now and later, with the cause."""
        if self.dead is not None:
            return
        self.dead = cause
        self._held.fail_all(cause)
        for client in self.cores:
            client.fail_all(cause)
        if not self._closing:
            self.listener.core_died(cause)

    def replica_died(self, tracker: ReplicaTracker, cause: str) -> None:
        """Retry the streams of a dead replica that have no output on another one; end if no replica is left."""
        if self.dead is not None or tracker.removed:
            return
        self._last_death = cause
        moved = sum(self._move(tracker, stream) for stream in tracker.client.streams() if stream.has_no_output)
        if moved:
            s, where = "" if moved == 1 else "s", "on other replicas" if self.serving else "when a replica serves"
            log.warning("%s: retrying %d request%s that had no output %s", tracker.client.name, moved, s, where)
        if self.replicas:
            living = sum(one.client.dead is None for one in self.trackers)
            log.error("%s; %d of %d replicas continue to serve", cause, living, len(self.replicas))
        if not self._supervised:
            self._end_without_replicas(cause)

    def _end_without_replicas(self, cause: str) -> None:
        """Fail everything if no replica lives and none is being started."""
        waiting = self._starting or any(one.restarting for one in self._trackers.values())
        if self.dead is None and not waiting and all(client.dead is not None for client in self.cores):
            self.fail_all(f"no replica is left; {cause}" if self.replicas else cause)

    def _move(self, tracker: ReplicaTracker, stream: RequestStream, *, retry: bool = True) -> bool:
        """Move a stream to another replica; False if there is none, or if it was retried before.

        A second retry would let a request that kills its replica kill all of them. `retry` False: its replica lives.
        """
        if (retry and stream.moved) or not (self.serving or self._supervised):
            return False
        try:
            stream.moved |= retry
            tracker.release(stream)
            self._submit(stream)
        except Exception as error:  # only this stream fails
            log.exception("a request of %s could not be retried elsewhere", tracker.client.name)
            dead = tracker.client.dead or f"{tracker.client.name} is removed"
            stream.release_inputs()
            stream.fail(RedlineError(f"{dead}; the request could not be retried elsewhere: {cause_of(error)}"))
            return False
        return True


def responsive(living: Sequence[ReplicaTracker]) -> Sequence[ReplicaTracker]:
    """The replicas that do not hang, or all if all hang."""
    return [one for one in living if not one.client.hung] or living
