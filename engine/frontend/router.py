"""Several replicas as one engine: a Router offers the methods of a CoreClient and has a CoreClient for each replica.

A stream stays on the replica that it was assigned to. If that replica dies before the stream has produced output, the
stream is retried once on another replica; otherwise it fails with the cause. The other replicas continue to serve, and
the server ends with the last one.
"""

import logging
from collections.abc import Sequence
from typing import Any

import msgspec

from engine.errors import EngineDeadError, RedlineError, cause_of
from engine.frontend.core_client import NO_OPTIONS, STOPPED, UNKNOWN_ORIGIN, CoreClient
from engine.frontend.feature_cache import PromptInputs
from engine.frontend.front_end_stats import FrontEndStats
from engine.frontend.listener import ClientListener, OutputRecord
from engine.frontend.prompts import Prompt, Text, length_of
from engine.frontend.replica_calls import ReplicaCalls
from engine.frontend.routing import (
    Candidate,
    LoadEstimate,
    OutputLengthEstimate,
    PrefixIndex,
    cached_tokens,
    make_routing_policy,
    prompt_block_hashes,
)
from engine.frontend.sampling_params import SamplingParams
from engine.frontend.simulated import refused_grammar
from engine.frontend.streams import Origin, Output, RequestOptions, RequestStream
from engine.frontend.transport import Transport
from engine.grammar import Grammar, GrammarCheck
from engine.messages import Ready

log = logging.getLogger("redline.router")

CHARACTERS_PER_TOKEN = 4  # to estimate the length of a text


class ReplicaTracker(ClientListener):
    """What a router knows of one replica: the work it has left, and the prefixes that it should have cached."""

    def __init__(self, router: "Router", client: CoreClient, output_length: OutputLengthEstimate):
        self.client = client
        groups = len(client.ready.kv_windows)  # a cached block of tokens takes a KV block in each group
        self.prefixes = PrefixIndex(client.ready.num_blocks // max(groups, 1))  # encoders have none
        self.assigned_tokens = 0.0  # in total, since the start
        self._router = router
        self._output_length = output_length
        self._load = LoadEstimate()

    def tokens_left(self) -> float:
        """Tokens that the replica has still to compute for all front ends."""
        client = self.client
        self._load.remove_computed_prompts()
        client.stats.load = self._load.tokens
        return client.stats.load if client.board is None else sum(one.load for one in client.board.stats)

    def assign(self, stream: RequestStream, cached: Sequence[int]) -> None:
        """Submit a stream to this replica; `cached` are the cached tokens of each of its prompts."""
        client = self.client
        client.submit(stream)
        choices = stream.params.n
        shared = client.ready.prefix_caching and stream.params.prompt_logprobs is None
        expected = self._output_length.expected(stream.params.max_tokens)
        for output in stream.live.values():
            first = output.index % choices == 0  # the other choices find its blocks in the cache
            missing = tokens_of(stream.prompts[output.prompt]) - cached[output.prompt] if first or not shared else 0
            self._load.add_output(output, missing, expected)
            self.assigned_tokens += missing + expected
        client.stats.load = self._load.tokens

    def release(self, stream: RequestStream) -> None:
        """Forget a stream that another replica takes over."""
        for handle in self.client.release(stream):
            self._load.remove_output(handle)
        self.client.stats.load = self._load.tokens

    # ----------------------------------------------------------------------------------------------- from the client

    @property
    def wants_records(self) -> bool:
        return self._router.listener.wants_records

    def output_ended(self, output: Output, reason: str) -> None:
        self._load.remove_output(output.handle)
        self.client.stats.load = self._load.tokens
        if reason in ("stop", "length"):
            self._output_length.observe(output.count)
        self._router.listener.output_ended(output, reason)

    def output_recorded(self, record: OutputRecord) -> None:
        self._router.listener.output_recorded(record)

    def core_died(self, cause: str) -> None:
        self._router.replica_died(self, cause)


class Router:
    """Several replicas of one engine, seen as one; lives in one event loop as its clients do."""

    def __init__(self, clients: Sequence[CoreClient], routing: str, seed: int = 0):
        """Make a router; `open` starts it.

        Args:
            clients: one for each replica, in the order of their numbers.
            routing: one of `engine.config.ROUTINGS`.
            seed: of random routing.
        """
        self.replicas = tuple(clients)
        first = self.replicas[0]
        self.ready = first.ready  # all replicas have the same configuration
        self.tokenizer = first.tokenizer
        self.inputs = first.inputs
        self.clock = first.clock
        self.alone = first.alone
        self.routing = routing
        self.dead: str | None = None  # the cause, once no replica is left
        self.listener = ClientListener()
        output_length = OutputLengthEstimate()
        self.trackers = tuple(ReplicaTracker(self, client, output_length) for client in self.replicas)
        self._policy = make_routing_policy(routing, seed)
        self._calls = ReplicaCalls(
            lambda: [tracker.client for tracker in self._serving()], lambda: self.dead or "the replicas ended meanwhile"
        )
        self._closing = False

    def open(self, listener: ClientListener | None = None) -> None:
        """Start receiving messages; called inside the event loop that will use the router."""
        if listener is not None:
            self.listener = listener
        for tracker in self.trackers:
            tracker.client.open(tracker)

    def close(self) -> None:
        """Stop receiving messages. Streams that are still live fail; `core_died` is not called."""
        self._closing = True
        self.fail_all(STOPPED)
        for client in self.replicas:
            client.close()

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
        able = responsive(self._serving())
        client = able[0].client
        client.check_request(prompts, params, options.priority)
        assert len(inputs) in (0, len(prompts)), "inputs are given for all prompts or for none"
        stream = RequestStream(prompts, params, client, self.clock.now(), origin, options, inputs, second_segments)
        self._route(stream, able)
        return stream

    def check_prompt(self, prompt: list[int]) -> None:
        """See `CoreClient.check_prompt`."""
        self.replicas[0].check_prompt(prompt)

    def _route(self, stream: RequestStream, able: Sequence[ReplicaTracker]) -> None:
        """Assign a stream to the replica that the routing policy chooses."""
        size, lengths = self.ready.block_size, stream.prompt_lengths
        hashes: list[list[bytes]] = [[] for _ in lengths]
        if self._policy.by_prefix and self.ready.prefix_caching:
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
                for tracker in self.trackers:
                    tracker.prefixes.clear()
        return sum(results) if method == "reset_prefix_cache" else results[0]

    async def check_grammar(self, grammar: Grammar) -> str:
        """See `CoreClient.check_grammar`. All replicas compile it, since each of them may get the request."""
        if refused := refused_grammar(self.ready):
            return refused
        arguments = {"kind": grammar.kind, "text": grammar.text}
        answers = await self._calls.call_responsive("check_grammar", arguments)
        checks = msgspec.convert(answers, list[GrammarCheck])
        self.replicas[0].stats.count_grammar([check.compile_s for check in checks])  # the stats are sums over replicas
        return max(check.cause for check in checks)

    # ----------------------------------------------------------------------------------------------------------- state

    @property
    def stats(self) -> FrontEndStats:
        """Where this front end counts what happens to requests before they reach a replica."""
        return self.replicas[0].stats

    @property
    def total_stats(self) -> FrontEndStats:
        """The stats of all replicas and front ends together, now."""
        dead = [client.dead is not None for client in self.replicas]
        return FrontEndStats.sum_replicas([client.total_stats for client in self.replicas], dead)

    @property
    def hung(self) -> str:
        """The cause, while no replica steps."""
        living = self._living()
        return living[0].client.hung if living and all(one.client.hung for one in living) else ""

    def _living(self) -> list[ReplicaTracker]:
        return [tracker for tracker in self.trackers if tracker.client.dead is None]

    def _serving(self) -> list[ReplicaTracker]:
        """The replicas that are alive. Raises EngineDeadError if none is."""
        if self.dead is not None:
            raise EngineDeadError(self.dead)
        return self._living()

    # --------------------------------------------------------------------------------------------------------- the end

    def core_lost(self, replica: int, cause: str) -> None:
        """A replica is gone; `replica_died` follows."""
        self.replicas[replica].core_lost(replica, cause)

    def core_up(self, replica: int, ready: Ready, transport: Transport) -> None:
        """A replica has a new core: it gets requests again, and its prefix cache is empty."""
        self.replicas[replica].core_up(replica, ready, transport)
        self.trackers[replica].prefixes.clear()
        self.dead = None

    def core_lost_threadsafe(self, replica: int, cause: str) -> None:
        """`core_lost`, from any thread; for `Engine.watch`."""
        self.replicas[replica].core_lost_threadsafe(replica, cause)

    def fail_all(self, cause: str) -> None:
        """Fail all streams and calls of all replicas, now and later, with the cause."""
        if self.dead is not None:
            return
        self.dead = cause
        for client in self.replicas:
            client.fail_all(cause)
        if not self._closing:
            self.listener.core_died(cause)

    def replica_died(self, tracker: ReplicaTracker, cause: str) -> None:
        """Retry the streams of a dead replica that have no output on another one; end if no replica is left."""
        if self.dead is not None:  # all replicas end
            return
        moved = sum(self._move(tracker, stream) for stream in tracker.client.streams() if stream.has_no_output)
        if moved:
            name, s = tracker.client.name, "" if moved == 1 else "s"
            log.warning("%s: retrying %d request%s that had no output on other replicas", name, moved, s)
        living = len(self._living())
        log.error("%s; %d of %d replicas continue to serve", cause, living, len(self.replicas))
        if not living:
            self.fail_all(f"no replica is left; {cause}")

    def _move(self, tracker: ReplicaTracker, stream: RequestStream) -> bool:
        """Move a stream to another replica; False if there is none, or if the stream was moved before.

        A second retry would let a request that kills its replica kill all of them.
        """
        living = self._living()
        if not living or stream.moved:
            return False
        try:
            stream.moved = True
            tracker.release(stream)
            self._route(stream, responsive(living))
        except Exception as error:  # only this stream fails
            log.exception("a request of %s could not be retried elsewhere", tracker.client.name)
            dead = tracker.client.dead
            stream.release_inputs()
            stream.fail(RedlineError(f"{dead}; the request could not be retried elsewhere: {cause_of(error)}"))
            return False
        return True


def responsive(living: Sequence[ReplicaTracker]) -> Sequence[ReplicaTracker]:
    """The replicas that do not hang, or all if all hang."""
    return [one for one in living if not one.client.hung] or living


def tokens_of(prompt: Prompt) -> int:
    """The number of tokens of a prompt; an estimate for a text."""
    return length_of(prompt) if isinstance(prompt, list) else len(prompt.text) // CHARACTERS_PER_TOKEN
