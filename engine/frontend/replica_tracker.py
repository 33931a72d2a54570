"""What a router knows of one replica: its state, the work that it has left, and the prefixes it should have cached."""

from collections.abc import Sequence
from typing import Any, Protocol

from engine.frontend.core_client import CoreClient
from engine.frontend.listener import ClientListener, OutputRecord
from engine.frontend.prompts import Prompt, length_of
from engine.frontend.routing import LoadEstimate, OutputLengthEstimate, PrefixIndex
from engine.frontend.streams import Output, RequestStream

CHARACTERS_PER_TOKEN = 4  # to estimate the length of a text


class Owner(Protocol):
    """The part of a router that its trackers use."""

    listener: ClientListener

    def replica_died(self, tracker: "ReplicaTracker", cause: str) -> None: ...

    def replica_drained(self, tracker: "ReplicaTracker") -> None: ...


class ReplicaTracker(ClientListener):
    """One replica of a router; the listener of its client."""

    def __init__(self, router: Owner, client: CoreClient, output_length: OutputLengthEstimate):
        self.client = client
        ready = client.ready
        groups = max(len(ready.kv_windows), 1)  # a cached block of tokens takes a KV block in each; encoders have none
        self.prefixes = PrefixIndex(ready.num_blocks // groups, [count // groups for count in ready.spilled_blocks])
        self.assigned_tokens = 0.0  # in total, since the start
        self.drain = 0  # the number of its drain; 0: it is not drained
        self.restarting = False  # its core is gone, and a new one is being started
        self.removed = False  # its counters are kept
        self._router = router
        self._output_length = output_length
        self._load = LoadEstimate()

    @property
    def draining(self) -> bool:
        """Whether it gets no new requests, and is removed once those that it has are done."""
        return self.drain > 0

    @property
    def takes_requests(self) -> bool:
        return self.client.dead is None and not self.draining

    def health(self) -> dict[str, Any]:
        """The state of the replica, as of `CoreClient.health`, or with the status restarting or draining."""
        state = self.client.health()
        if self.restarting:
            state["status"] = "restarting"
        elif self.draining:  # also if it has ended meanwhile, until it is removed
            state["status"] = "draining"
        return state

    def core_replaced(self) -> None:
        """A new core serves, with an empty prefix cache."""
        self.drain = 0
        self.restarting = self.removed = False
        self.prefixes.clear()

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
        if self.draining and not self.client.num_live:
            self._router.replica_drained(self)

    def output_recorded(self, record: OutputRecord) -> None:
        self._router.listener.output_recorded(record)

    def core_died(self, cause: str) -> None:
        self._router.replica_died(self, cause)


def tokens_of(prompt: Prompt) -> int:
    """The number of tokens of a prompt; an estimate for a text."""
    return length_of(prompt) if isinstance(prompt, list) else len(prompt.text) // CHARACTERS_PER_TOKEN
