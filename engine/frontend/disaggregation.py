"""Routing with prefill/decode disaggregation: requests go to decode replicas, long prompts also to prefill replicas.

A decode replica that lacks much of a prompt asks for it (`engine.kv_transfer`). Its front end has a prefill replica
compute the prompt, and generate one token, which is dropped. Prefill replicas are chosen as other replicas are: by the
work they have left, and the prefixes that they should have cached.

While no prefill replica lives, decode replicas compute prompts themselves. While no decode replica lives, prefill
replicas serve whole requests.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from msgspec.structs import replace

from engine.disaggregation import PREFILL
from engine.errors import INTERRUPTS, cause_of
from engine.frontend.core_client import CoreClient
from engine.frontend.feature_cache import placed_inputs
from engine.frontend.replica_tracker import Owner, ReplicaTracker
from engine.frontend.router import Router, responsive
from engine.frontend.routing import Candidate, OutputLengthEstimate, cached_tokens, prompt_block_hashes
from engine.frontend.streams import Output, RequestStream
from engine.kv_transfer import KVPush, PrefillEnded, PrefillWanted
from engine.messages import Abort, Finished, FinishReason, Outputs, Sampling, make_handle

log = logging.getLogger("redline.router")


@dataclass(slots=True, eq=False)
class Prefill:
    """A prompt that a prefill replica computes for an output of a decode replica."""

    handle: int  # in the prefill replica
    output: Output  # of the decode replica
    decode: "DisaggregatedTracker"
    push: KVPush
    tried: "tuple[DisaggregatedTracker, ...]"  # prefill replicas, the computing one last; the others could not send it
    count: int = 0  # tokens that have arrived; see `engine.frontend.routing.CountedOutput`


class DisaggregatedClient(CoreClient):
    """The client of a replica that computes prompts for others, or has others compute them."""

    tracker: "DisaggregatedTracker"  # set by it

    def _process(self, message: Outputs) -> None:
        for wanted in message.prefills:
            if (output := self._live.get(wanted.handle)) is not None:
                self.tracker.prefill_wanted(output, wanted)
        if self.tracker.prefills:
            for one in message.finished:
                self.tracker.prefill_finished(one)
        super()._process(message)

    @property
    def num_live(self) -> int:
        """Outputs that the core has still to end, and prompts that it computes for others."""
        return super().num_live + len(self.tracker.prefills)

    def health(self) -> dict[str, Any]:
        """The state of the replica as of `CoreClient.health`, and its role."""
        return super().health() | {"role": self.ready.role}

    def start_prefill(self, output: Output, push: KVPush) -> int:
        """Have this replica compute the prompt of another one's output; returns the handle. Raises if it can't."""
        stream, sequence = output.stream, next(self._numbers)
        message = self._message(stream, output.prompt, 0, sequence, ())
        self._transport.send(
            replace(
                message, max_tokens=1, min_tokens=0, stop_ids=(), sampling=Sampling(), grammar=None, reasoning=None,
                remote_prefill=False, push=push,
            )
        )  # fmt: skip
        return make_handle(self._front_end, sequence)

    def abort_prefill(self, handle: int) -> None:
        """Abort the computation of a prompt."""
        if self.dead is None:
            self._transport.send(Abort((handle,)))

    def report_prefill(self, ended: PrefillEnded) -> None:
        """Report the end of a prefill to the core that waits for it."""
        if self.dead is None:
            self._transport.send(ended)

    def send_features_again(self, stream: RequestStream, prompt: int) -> None:
        """The core could not use the multimodal inputs of a prompt: they are sent anew with the next request."""
        if self.features is not None and stream.inputs:
            self.features.send_again(self.replica, placed_inputs(stream.inputs[prompt]))


class DisaggregatedTracker(ReplicaTracker):
    """A replica and its part in disaggregation."""

    client: DisaggregatedClient
    _router: "DisaggregatedRouter"

    def __init__(self, router: Owner, client: CoreClient, output_length: OutputLengthEstimate):
        super().__init__(router, client, output_length)
        self.client.tracker = self
        self.is_prefill = self.client.ready.role == PREFILL
        self.prefills: dict[int, Prefill] = {}  # that this replica computes, by handle
        self.wanted: dict[int, tuple[DisaggregatedTracker, Prefill]] = {}  # that it waits for, by handle of the output

    def assign(self, stream: RequestStream, cached: Sequence[int]) -> None:
        remote = stream.options.remote_prefill  # then it computes next to nothing of the prompts
        super().assign(stream, [max(0, length - 1) for length in stream.prompt_lengths] if remote else cached)

    def release(self, stream: RequestStream) -> None:
        for handle in list(stream.live):
            self._cancel(handle)
        super().release(stream)

    def output_ended(self, output: Output, reason: str) -> None:
        self._cancel(output.handle)
        super().output_ended(output, reason)

    def _cancel(self, handle: int) -> None:
        """End the prefill for an output of this replica that has ended."""
        if (found := self.wanted.pop(handle, None)) is not None:
            computing, prefill = found
            computing.remove_prefill(prefill)
            computing.client.abort_prefill(prefill.handle)

    # ---------------------------------------------------------------------------------------------- of a decode replica

    def prefill_wanted(self, output: Output, wanted: PrefillWanted) -> None:
        """The core waits for blocks of an output's prompt."""
        push = KVPush(self.client.ready.kv_address, output.handle, wanted.cached_blocks)
        self._router.start_prefill(self, output, push)

    # --------------------------------------------------------------------------------------------- of a prefill replica

    def start_prefill(
        self,
        decode: "DisaggregatedTracker",
        output: Output,
        push: KVPush,
        cached: int,
        tried: "tuple[DisaggregatedTracker, ...]",
    ) -> None:
        """Compute a prompt, of which `cached` tokens should be in the prefix cache. Raises what sending does.

        `tried`: other replicas, which could not send it.
        """
        prefill = Prefill(self.client.start_prefill(output, push), output, decode, push, (*tried, self))
        missing = output.stream.prompt_lengths[output.prompt] - cached
        self.prefills[prefill.handle] = prefill
        decode.wanted[output.handle] = self, prefill
        self._load.add_output(prefill, missing, 1)
        self.assigned_tokens += missing
        self.client.stats.load = self._load.tokens

    def prefill_finished(self, finished: Finished) -> None:
        """The core has ended a request: if that computed a prompt, the decode replica is notified."""
        prefill = self.prefills.get(finished.handle)
        if prefill is None:
            return
        cause = ""
        if finished.reason == FinishReason.UNREACHABLE:
            self._forget(prefill)
            cause = finished.error
            self._router.start_prefill(prefill.decode, prefill.output, prefill.push, prefill.tried, cause)
            return
        if finished.reason != FinishReason.LENGTH:
            cause = finished.error or "the prefill was aborted"
            if finished.reason in (FinishReason.FAILED, FinishReason.NOT_ENCODED):
                self.client.send_features_again(prefill.output.stream, prefill.output.prompt)
        self.end_prefill(prefill, cause)

    def end_prefill(self, prefill: Prefill, cause: str) -> None:
        """A prefill has ended; with a cause: without all blocks."""
        self._forget(prefill)
        prefill.decode.client.report_prefill(PrefillEnded(prefill.output.handle, cause))

    def _forget(self, prefill: Prefill) -> None:
        self.remove_prefill(prefill)
        del prefill.decode.wanted[prefill.output.handle]

    def remove_prefill(self, prefill: Prefill) -> None:
        """Forget a prefill that this replica computed."""
        del self.prefills[prefill.handle]
        self._load.remove_output(prefill.handle)
        self.client.stats.load = self._load.tokens
        if self.draining and not self.client.num_live:
            self._router.replica_drained(self)


class DisaggregatedRouter(Router):
    """Assigns requests to decode replicas, and prompts to prefill replicas."""

    tracker_type = DisaggregatedTracker

    def _able(self, serving: Sequence[ReplicaTracker]) -> Sequence[ReplicaTracker]:
        """The decode replicas; all if none serves."""
        return responsive([one for one in serving if not cast(DisaggregatedTracker, one).is_prefill] or serving)

    def _route(self, stream: RequestStream, able: Sequence[ReplicaTracker]) -> None:
        decodes = not any(cast(DisaggregatedTracker, one).is_prefill for one in able)
        remote = decodes and bool(self._prefill_replicas()) and stream.params.prompt_logprobs is None
        stream.options = replace(stream.options, remote_prefill=remote)
        super()._route(stream, able)

    def _prefill_replicas(self) -> list[DisaggregatedTracker]:
        """The prefill replicas that can be used."""
        trackers = (cast(DisaggregatedTracker, one) for one in self.trackers if one.takes_requests)
        return [one for one in trackers if one.is_prefill and not one.client.hung]

    def start_prefill(
        self,
        decode: DisaggregatedTracker,
        output: Output,
        push: KVPush,
        tried: tuple[DisaggregatedTracker, ...] = (),
        cause: str = "no prefill replica is left",
    ) -> None:
        """Have a prefill replica compute the prompt of an output.

        Args:
            tried: those that could not send it.
            cause: why the decode replica has to compute it if there is no other.
        """
        if able := [one for one in self._prefill_replicas() if one not in tried]:
            try:
                self._choose_prefill(able, decode, output, push, tried)
                return
            except INTERRUPTS:
                raise
            except Exception as error:  # the decode replica computes it
                log.exception("the prompt of a request could not be sent to a prefill replica")
                cause = cause_of(error)
        decode.client.report_prefill(PrefillEnded(output.handle, cause))

    def _choose_prefill(
        self,
        able: Sequence[DisaggregatedTracker],
        decode: DisaggregatedTracker,
        output: Output,
        push: KVPush,
        tried: tuple[DisaggregatedTracker, ...],
    ) -> None:
        stream, number = output.stream, output.prompt
        prompt, length = stream.prompts[number], stream.prompt_lengths[number]
        assert isinstance(prompt, list), "a text was not tokenized"
        size, hashes = self.ready.block_size, list[bytes]()
        if self._policy.by_prefix:
            hashes = prompt_block_hashes(prompt, stream.options, size, stream.inputs[number] if stream.inputs else ())
        cached = [cached_tokens([hashes], [length], one.prefixes, size)[0] for one in able]
        position = self._policy.choose(
            [
                Candidate(one.tokens_left(), tokens, one.assigned_tokens)
                for one, tokens in zip(able, cached, strict=True)
            ]
        )
        able[position].start_prefill(decode, output, push, cached[position], tried)
        able[position].prefixes.record(hashes)

    def replica_died(self, tracker: ReplicaTracker, cause: str) -> None:
        """Also has decode replicas compute the prompts that a dead prefill replica can't."""
        assert isinstance(tracker, DisaggregatedTracker)
        for prefill in list(tracker.prefills.values()):
            tracker.end_prefill(prefill, cause)
        super().replica_died(tracker, cause)

    def end_drain(self, replica: int, cause: str) -> None:
        """Also has decode replicas compute the prompts that a prefill replica has no time for."""
        tracker = self._trackers[replica]
        assert isinstance(tracker, DisaggregatedTracker)
        if tracker.draining:
            for prefill in list(tracker.prefills.values()):
                tracker.client.abort_prefill(prefill.handle)
                tracker.end_prefill(prefill, cause)
        super().end_drain(replica, cause)
