"""A server on simulated hardware in virtual time: requests go in at some time, and their tokens have times of arrival.

Each replica is the real core. What a server adds in front of it is the cost of a request until it reaches the core
(`request_s`), which delays the request and doesn't occupy the engine, and the choice of a replica, by the router's own
estimates and policies.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.columns import column, int32s
from engine.errors import ConfigError
from engine.frontend.routing import (
    Candidate,
    LoadEstimate,
    OutputLengthEstimate,
    PrefixIndex,
    block_hashes,
    cached_tokens,
    make_routing_policy,
)
from engine.frontend.streams import RequestOptions
from engine.hardware.executor import SimulatedExecutor
from engine.hardware.images import ImageProcessing, SimulatedImage, with_images
from engine.hardware.token_log import TokenLog, TokenTimes
from engine.hardware.virtual_engine import VirtualClock, VirtualEngine
from engine.messages import Abort, AddRequest, FinishReason, MMInputRef, Outputs, Sampling, decode_from_core, encode
from engine.resolved_config import ResolvedConfig
from engine.stats import Stats

_ENDED_WELL = (FinishReason.STOP, FinishReason.LENGTH)


class ImageInputs:
    """What becomes of the images of requests before the core has them.

    Args:
        config: fields of the model's config.json.
        placeholder: id of the token that stands for an embedding.
        processing: of the images, by the processes beside the engine.
        inline: the engine's loop processes them instead, and does nothing else meanwhile.
    """

    def __init__(
        self, config: Mapping[str, Any], placeholder: int, processing: ImageProcessing, *, inline: bool = False
    ):
        self._config, self._placeholder, self._processing, self._inline = config, placeholder, processing, inline

    def place(
        self, prompt: Sequence[int] | NDArray[np.int32], images: Sequence[SimulatedImage]
    ) -> tuple[NDArray[np.int32], tuple[MMInputRef, ...]]:
        """The prompt with its images, and what the core gets of them."""
        return with_images(self._config, prompt, images, self._placeholder)

    def ready(self, now: float, images: Sequence[SimulatedImage]) -> float:
        """When the request can be sent to the core."""
        return now if self._inline else self._processing.end(now, images)

    def busy_seconds(self, images: Sequence[SimulatedImage]) -> float:
        """For how long the engine's loop does nothing else when it gets them."""
        return self._processing.seconds(images) if self._inline else 0.0


@dataclass(slots=True)
class Reply:
    """What became of a request, so far."""

    handle: int
    prompt_tokens: int
    count: int = 0  # tokens; 1 from the first one on until it ended or the reply was taken
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    ended: bool = False  # with all its tokens, or an error; not if it was aborted
    error: str = ""  # why it was not served
    refused: bool = False  # because of what it asks for
    images: Sequence[SimulatedImage] = ()
    times: TokenTimes | None = None  # set when the reply is taken; None: no token came


class SimulatedReplica:
    """One replica with its log of tokens, and what the router knows of it."""

    def __init__(
        self,
        config: ResolvedConfig,
        executor: SimulatedExecutor,
        clock: VirtualClock,
        lengths: OutputLengthEstimate,
    ):
        self.log = TokenLog()
        self.executor = executor
        self.engine = VirtualEngine(config, executor, clock, self._receive)
        self.prefixes = PrefixIndex(config.num_blocks // len(config.kv_windows))
        self.assigned_tokens = 0.0
        self.ended: list[Reply] = []  # since the caller last took them
        self._lengths = lengths
        self._load = LoadEstimate()
        self._open: dict[int, Reply] = {}

    def tokens_left(self) -> float:
        self._load.remove_computed_prompts()
        return self._load.tokens

    def add(self, reply: Reply, message: AddRequest, cached: int) -> None:
        """Hand a request to the core; `cached` tokens of its prompt should be in the prefix cache."""
        self._open[reply.handle] = reply
        self._load.remove_computed_prompts()
        missing, expected = reply.prompt_tokens - cached, self._lengths.expected(message.max_tokens)
        self._load.add_output(reply, missing, expected)
        self.assigned_tokens += missing + expected
        self.engine.core.receive(encode(message))

    def abort(self, replies: Sequence[Reply]) -> None:
        """End those of the requests that are here; they don't count as ended."""
        mine = tuple(reply.handle for reply in replies if reply.handle in self._open)
        if mine:
            before, self.ended = self.ended, []
            self.engine.core.receive(encode(Abort(mine)))
            self.engine.turn()
            self.ended = before

    def _receive(self, _front_end: int, data: bytes) -> None:
        message = decode_from_core(data)
        assert isinstance(message, Outputs), f"the core sent {message}"
        assert not message.counts, "the log counts one token in a message"
        for one in message.admitted:
            self._open[one.handle].cached_tokens = one.cached_tokens
        if message.handles:
            for handle in self.log.add(message.at, message.handles):
                self._open[handle].count = 1
        for end in message.finished:
            reply = self._open.pop(end.handle)
            reply.ended, reply.error = end.reason != FinishReason.ABORT, end.error
            reply.refused = end.reason == FinishReason.ERROR
            reply.count = self.log.count(end.handle)
            self._load.remove_output(end.handle)
            if end.reason in _ENDED_WELL:
                self._lengths.observe(reply.count)
            self.ended.append(reply)


class Simulation:
    """A server in virtual time: `submit` and `run_until` in turn, then `take` what came of the requests."""

    def __init__(
        self,
        config: ResolvedConfig,
        make_executor: Callable[[VirtualClock], SimulatedExecutor],
        *,
        request_s: float = 0.0,
        replicas: int = 1,
        routing: str = "prefix",
        seed: int = 0,
        images: ImageInputs | None = None,
    ):
        """
        Args:
            config: of each replica.
            make_executor: called once for each replica.
            request_s: seconds from a request's arrival until it reaches the core.
            replicas: their number.
            routing: one of `engine.config.ROUTINGS`.
            seed: of random routing.
            images: what becomes of the images of requests; None: of a model that takes texts only.
        """
        self.config = config
        self._images = images
        self._clock = VirtualClock()
        lengths = OutputLengthEstimate()
        self.replicas = [
            SimulatedReplica(config, make_executor(self._clock), self._clock, lengths) for _ in range(replicas)
        ]
        self._policy = make_routing_policy(routing, seed)
        self._request_s = request_s
        self._arriving: list[tuple[float, int, Reply, AddRequest]] = []  # a heap
        self._submitted = 0

    def now(self) -> float:
        """Seconds since the start."""
        return self._clock.now()

    def submit(
        self, prompt: Sequence[int] | NDArray[np.int32], max_tokens: int, images: Sequence[SimulatedImage] = ()
    ) -> Reply:
        """Send a request now; its reply fills with time. It gets exactly `max_tokens` tokens, as with ignore_eos.

        Raises ConfigError for images if the model takes none.
        """
        inputs: tuple[MMInputRef, ...] = ()
        at = self.now()
        if images:
            if self._images is None:
                raise ConfigError("the model takes no images: choose another one, or a workload of texts (--workload)")
            prompt, inputs = self._images.place(prompt, images)
            at = self._images.ready(at, images)
        reply = Reply(self._submitted, len(prompt), images=images)
        self._submitted += 1
        most = min(max_tokens, self._room(len(prompt)))
        message = AddRequest(reply.handle, column(prompt), most, Sampling(), mm_inputs=inputs)
        heapq.heappush(self._arriving, (at + self._request_s, reply.handle, reply, message))
        return reply

    def _room(self, prompt_tokens: int) -> int:
        """Most output tokens behind a prompt; 1 if it is too long, which is an error that the core reports."""
        return max(self.config.max_model_len - prompt_tokens, 1)

    def run_until(self, time: float) -> list[Reply]:
        """Let time pass up to `time`, or up to the first moment at which requests end; returns these."""
        while (event := self._next_event()) is not None and event <= time:
            self._clock.move_to(event)
            arrived = self._assign_arrivals()
            for replica in self.replicas:
                due = replica.engine.next_event
                if replica in arrived or (due is not None and due <= event):
                    replica.engine.turn()
            if any(replica.ended for replica in self.replicas):
                return self._take_ended()
        self._clock.move_to(time)
        return []

    def _next_event(self) -> float | None:
        events = [replica.engine.next_event for replica in self.replicas]
        if self._arriving:
            events.append(self._arriving[0][0])
        return min((event for event in events if event is not None), default=None)

    def _assign_arrivals(self) -> list[SimulatedReplica]:
        """Hand requests that are due to replicas; returns these."""
        assigned = []
        while self._arriving and self._arriving[0][0] <= self.now():
            _, _, reply, message = heapq.heappop(self._arriving)
            replica, cached = self._choose(message) if len(self.replicas) > 1 else (self.replicas[0], 0)
            if self._images is not None and reply.images:
                replica.executor.occupy(self._images.busy_seconds(reply.images))
            replica.add(reply, message, cached)
            assigned.append(replica)
        return assigned

    def _choose(self, message: AddRequest) -> tuple[SimulatedReplica, int]:
        """The replica for a request, and the tokens of its prompt that should be cached there."""
        size, length = self.config.block_size, len(message.prompt) // 4
        hashes: list[bytes] = []
        if self._policy.by_prefix and self.config.enable_prefix_caching:
            hashes = block_hashes(int32s(message.prompt), RequestOptions(), size, message.mm_inputs)
        cached = [cached_tokens([hashes], [length], one.prefixes, size)[0] for one in self.replicas]
        candidates = [
            Candidate(one.tokens_left(), found, one.assigned_tokens)
            for one, found in zip(self.replicas, cached, strict=True)
        ]
        place = self._policy.choose(candidates)
        self.replicas[place].prefixes.record(hashes)
        return self.replicas[place], cached[place]

    def _take_ended(self) -> list[Reply]:
        ended = [reply for replica in self.replicas for reply in replica.ended]
        for replica in self.replicas:
            replica.ended = []
        return ended

    def abort(self, replies: Sequence[Reply]) -> None:
        """End requests whose client has gone."""
        gone = {reply.handle for reply in replies}
        self._arriving = [one for one in self._arriving if one[1] not in gone]
        heapq.heapify(self._arriving)
        for replica in self.replicas:
            replica.abort(replies)

    def take(self, replies: Sequence[Reply]) -> None:
        """Set the times of replies that ended or were aborted. The simulation forgets these requests."""
        handles = [reply.handle for reply in replies]
        for replica in self.replicas:
            for reply, times in zip(replies, replica.log.take(handles), strict=True):
                if times is not None:
                    reply.times, reply.count = times, len(times.gaps_s) + 1

    def stats(self) -> list[Stats]:
        """Gauges and counters of each replica."""
        return [replica.engine.core.scheduler.stats(self.now()) for replica in self.replicas]
