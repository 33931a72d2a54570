"""The scheduler of a replica with prefill/decode disaggregation: its prompts are sent block by block, or arrive."""

import math
from collections.abc import Sequence

from msgspec.structs import replace

from engine.core.feature_mirror import FeatureMirror
from engine.core.incoming_blocks import IncomingBlocks, Transfer
from engine.core.kv_cache_manager import CachedPrefix
from engine.core.outgoing_blocks import OutgoingBlocks
from engine.core.request import Request
from engine.core.scheduler import Scheduler
from engine.core.spill_scheduler import SpillScheduler
from engine.disaggregation import DECODE, PREFILL
from engine.kv_transfer import Place, missing_places, num_shared_blocks
from engine.messages import COPY_IN, Admitted, Finished, FinishReason
from engine.resolved_config import ResolvedConfig
from engine.stats import Stats

# A prompt that lacks no more blocks is computed where it is continued: its tokens lengthen one step there by little,
# while a prefill replica may have to compute the whole prompt for them.
MAX_LOCAL_BLOCKS = 4


class DisaggregatedScheduler(Scheduler):
    """Also knows which requests send the blocks of their prompt, and which begin with blocks that arrived."""

    def __init__(self, config: ResolvedConfig, features: FeatureMirror | None = None):
        super().__init__(config, features)
        host_blocks = range(config.host_blocks, config.host_blocks + config.transfer_blocks)
        self.incoming = IncomingBlocks(host_blocks if config.role == DECODE else ())
        self.outgoing = OutgoingBlocks(host_blocks if config.role == PREFILL else ())
        self._copies: list[tuple[int, int, int]] = []  # of the next step, see CopyingStep
        self._copied_in: list[int] = []  # host blocks that are free once that is computed

    def wait_for_blocks(self, request: Request) -> bool:
        """Have a request wait for blocks of its prompt; False if it has enough of them, or can't wait for so many."""
        if not request.reads_prefix_cache:
            return False
        end = num_shared_blocks(request.num_prompt_tokens, self.config.block_size)
        cached = self._num_cached_blocks(request.block_hashes[:end])
        return end - cached > MAX_LOCAL_BLOCKS and self.incoming.wait(request, cached, self._missing(request, cached))

    def _num_cached_blocks(self, hashes: Sequence[bytes]) -> int:
        """The length of the longest prefix that needs not be computed."""
        return self.kv.find_cached_prefix(hashes).num_blocks

    def push_blocks(self, request: Request) -> None:
        """Send the blocks of a request's prompt as they are computed."""
        push = request.message.push
        assert push is not None, "the request has no push"
        self.outgoing.add(request, self._missing(request, push.first).items())

    def _missing(self, request: Request, first: int) -> dict[Place, bytes]:
        """The blocks that follow the first ones of a prompt and are of use to another replica, with their keys."""
        size = self.config.block_size
        places = missing_places(self.config.kv_windows, size, first, num_shared_blocks(request.num_prompt_tokens, size))
        return {(group, number): self.kv.key(request.block_hashes[number], group) for group, number in places}

    @property
    def has_freed_slots(self) -> bool:
        """Whether workers still compute slots that were freed, unless a step says otherwise."""
        return self._builder.has_freed_slots

    def take_copies(self) -> tuple[list[tuple[int, int, int]], list[int]]:
        """The copies of the step that was scheduled, and the host blocks that are free once it is computed."""
        taken = self._copies, self._copied_in
        self._copies, self._copied_in = [], []
        return taken

    def stats(self, last_step_at: float) -> Stats:
        counters = self.incoming.counters
        return replace(
            super().stats(last_step_at),
            kv_transfers=counters.transfers,
            kv_transfers_lost=counters.lost,
            kv_blocks_sent=self.outgoing.num_sent,
            kv_blocks_received=counters.blocks,
            kv_blocks_rejected=counters.rejected_blocks,
        )

    # ------------------------------------------------------------------------------------------------------ admission

    def _find_cached_prefix(self, request: Request, num_tokens: int) -> CachedPrefix:
        prefix = super()._find_cached_prefix(request, num_tokens)
        transfer = self.incoming.of(request.handle)
        if transfer is None or not transfer.host_blocks:
            return prefix
        if self.kv.num_blocks_needed(num_tokens, prefix) > self.pool.num_free:  # it is not admitted now
            return prefix
        self._copy_in(prefix, transfer)
        return super()._find_cached_prefix(request, num_tokens)

    def _copy_in(self, prefix: CachedPrefix, transfer: Transfer) -> None:
        """Have the next step copy the blocks of a transfer into the KV cache, up to the first one that is lost."""
        host_blocks = self.incoming.take_blocks(transfer)
        self._copied_in += host_blocks.values()
        lost = min((number for group, number in transfer.keys.keys() - transfer.arrived), default=math.inf)
        content = {transfer.keys[place]: host for place, host in host_blocks.items() if place[1] < lost}
        missing = [key for key in content if key not in self.pool.block_of]
        blocks = self.kv.add_cached(prefix, missing)
        self._add_copies([(COPY_IN, block, content[key]) for block, key in zip(blocks, missing, strict=True)])

    def _add_copies(self, copies: list[tuple[int, int, int]]) -> None:
        """Add to the copies of the next step."""
        self._copies += copies

    def _count_admission(self, request: Request, num_cached: int, now: float) -> None:
        if request.message.push is not None:
            self.outgoing.admit(request.handle, num_cached)
        transfer = self.incoming.admit(request.handle)
        if transfer is None or not transfer.is_complete:
            super()._count_admission(request, num_cached, now)
            return
        request.was_admitted = True  # the prefill replica has counted its prompt
        known = max(transfer.cached_blocks * self.config.block_size, transfer.cached_tokens)
        tokens = request.num_prompt_tokens if request.mm_inputs_end else 0
        self.admitted.append(Admitted(request.handle, min(known, num_cached), now - request.arrived, tokens))

    def _finish(self, request: Request, reason: FinishReason, stop_id: int = -1, error: str = "") -> Finished:
        self.incoming.remove(request.handle)
        if request.message.push is not None:
            if reason == FinishReason.LENGTH:
                self.counters.generation_tokens -= 1  # no client gets it
                self.outgoing.complete(request.handle)
            else:
                self.outgoing.cancel(request.handle)
        return super()._finish(request, reason, stop_id, error)


class DisaggregatedSpillScheduler(DisaggregatedScheduler, SpillScheduler):
    """With `--kv-spill`: what a replica keeps outside of its KV cache is not sent to it.

    Host blocks of the tiers come first, then those of transfers. A block that arrived is copied to the KV cache, and
    spilled when that evicts it. All copies of a step are in one list, in the order in which they were decided.
    """

    def _num_cached_blocks(self, hashes: Sequence[bytes]) -> int:
        return self.tiers.num_cached_blocks(hashes)

    def _add_copies(self, copies: list[tuple[int, int, int]]) -> None:
        self.tiers.add_copies(copies)
