"""The scheduler: one token budget per step, without a distinction between prefill and decode.

`schedule()` chooses the tokens of a step and immediately counts them as computed; `update()` books the sampled tokens
when they arrive. Several steps may be scheduled ahead of their results; the columns of `engine.core.slots` distinguish
confirmed tokens from those in flight. `engine.core.policy` has the decisions in which V0 and the ablations differ.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from engine.columns import int32s
from engine.core.counters import Counters
from engine.core.draft_tokens import DraftTokenTracker
from engine.core.feature_mirror import FeatureMirror
from engine.core.grammars import advance
from engine.core.hashing import extend_hashes
from engine.core.kv_cache_manager import CachedPrefix, KVCacheManager
from engine.core.mm_inputs import EncoderCacheManager
from engine.core.policy import Chunks, SchedulingPolicy
from engine.core.request import Request
from engine.core.slots import Slots
from engine.core.step_builder import FullStateStepBuilder, StepBuilder
from engine.core.steps import ScheduledStep, StepOutcome
from engine.messages import Admitted, Finished, FinishReason, StepReports, StepResult
from engine.resolved_config import ResolvedConfig
from engine.stats import Stats


class Scheduler:
    """Decides what each step computes; knows requests, slots and blocks, but neither models nor sockets."""

    def __init__(self, config: ResolvedConfig, features: FeatureMirror | None = None, kv: KVCacheManager | None = None):
        """`kv`: in place of a KVCacheManager."""
        self.config = config
        self.features = features or FeatureMirror()
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.policy = policy = SchedulingPolicy.from_resolved(config)
        self.waiting = policy.queue_order.make_queue()
        self.requests: dict[int, Request] = {}
        self.slots = Slots(config.max_num_seqs, config.max_model_len)
        self.kv = kv or KVCacheManager(config)
        self.pool = self.kv.pool
        self.encoder_cache = EncoderCacheManager.from_resolved(config)
        self.admitted: list[Admitted] = []  # since the caller last took them
        self.counters = Counters()
        self._now = 0.0  # of the step being scheduled
        self._prefilling: dict[int, None] = {}  # slots with more than one token to compute, oldest first
        builder = FullStateStepBuilder if policy.full_state else StepBuilder
        self._builder: StepBuilder = builder(self.slots, self.kv, self.encoder_cache)
        self._drafts: DraftTokenTracker | None = None
        if config.draft_tokens:
            self._drafts = DraftTokenTracker(self.slots, self.kv.num_blocks, config.draft_tokens, config.block_size)

    # ------------------------------------------------------------------------------------------------------- requests

    def request_error(self, request: Request) -> str | None:
        """Why a request can't be served, even if nothing else runs; None if it can. May be called from any thread."""
        error = request.length_error(self.config, whole_prompts=self.policy.chunking.whole_prompts)
        if error is None and request.message.mm_inputs:
            return self.encoder_cache.placeholder_error(request)
        return error

    def add(self, request: Request) -> Finished | None:
        """Queue a request; returns a Finished with the reason if it can't be served."""
        error = self.request_error(request)
        if request.handle in self.requests:
            error = f"handle {request.handle} is in use"
        if error is None and request.message.mm_inputs:
            error = self.encoder_cache.register(request)
        if error is not None:
            return Finished(request.handle, FinishReason.ERROR, error=error)
        self.requests[request.handle] = request
        self.waiting.append(request)
        return None

    def abort(self, handle: int) -> Finished | None:
        """End a request, waiting or running; None if it has ended already."""
        request = self.requests.get(handle)
        return None if request is None else self.end(request, FinishReason.ABORT)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything; freed slots count, since workers have to drop them."""
        return bool(self.waiting or self.slots.num_running or self._builder.has_freed_slots)

    def stats(self, last_step_at: float) -> Stats:
        return self.counters.stats(
            running=self.slots.num_running,
            waiting=len(self.waiting),
            kv_cache_usage=self.pool.usage,
            last_step_at=last_step_at,
            drafts=self._drafts,
            mm=self.features.stats(self.encoder_cache),
        )

    # ------------------------------------------------------------------------------------------------------- schedule

    def schedule(self, now: float, max_steps: int = 1) -> ScheduledStep | None:
        """Schedule the next step, or a burst of up to `max_steps` decode steps; None if workers have nothing to do."""
        slots, self._now = self.slots, now
        chunks: Chunks = []
        decoding = self.policy.batch_order.schedule_batch(self, chunks, now)
        scheduled = np.zeros(slots.count, np.bool_)
        scheduled[decoding] = True
        for slot, _ in chunks:
            scheduled[slot] = True
        num_tokens = len(decoding) + sum(n for _, n in chunks)
        if not num_tokens and not self._builder.has_freed_slots:
            return None
        sampling = np.flatnonzero(scheduled & (slots.num_computed_tokens == slots.num_scheduled_tokens))
        num_steps = self._extend_to_burst(decoding, max_steps) if max_steps > 1 and not chunks and num_tokens else 1
        if self._drafts is None:
            slots.num_scheduled_tokens[sampling] += num_steps
        else:
            self._drafts.step_scheduled(sampling)
        message = self._builder.build(self.counters.steps + 1, scheduled, chunks, num_steps)
        self.counters.steps += num_steps
        self.counters.step_tokens = num_tokens
        return ScheduledStep(message.step, message, sampling, slots.generation[sampling], num_tokens, num_steps)

    def _is_decode(self) -> NDArray[np.bool_]:
        """Slots with exactly one token to compute, not a placeholder, that may still sample."""
        slots = self.slots
        one_token = slots.num_scheduled_tokens - slots.num_computed_tokens == 1
        one_token &= slots.num_computed_tokens >= slots.mm_inputs_end
        return slots.live & one_token & (slots.num_scheduled_tokens < slots.max_num_tokens)

    def schedule_decodes(self) -> NDArray[np.intp]:
        """Schedule one token for each slot that decodes; returns these slots."""
        slots = self.slots
        decoding = np.flatnonzero(self._is_decode())
        slots.num_computed_tokens[decoding] += 1
        for slot in [s for s in self._prefilling if slots.num_computed_tokens[s] == slots.num_scheduled_tokens[s]]:
            del self._prefilling[slot]  # the last token of its prompt was scheduled like a decode
        return decoding

    def continue_prefills(self, budget: int, chunks: Chunks) -> int:
        """Schedule the next chunks of prefills in progress; returns the budget that is left for waiting requests."""
        held_back = False
        for slot in list(self._prefilling):
            count = self._schedule_chunk(slot, budget, chunks)
            held_back |= count == 0
            budget -= count
        # A prefill that waits for space in the encoder cache gets it before requests that arrived later.
        return 0 if held_back else budget

    def _extend_to_burst(self, decoding: NDArray[np.intp], max_steps: int) -> int:
        """How many steps these slots take at once, this one included; allocates their blocks.

        No slot exceeds its `max_num_tokens`, so tokens are dropped only after a stop token. No request is preempted.
        """
        slots, size = self.slots, self.config.block_size
        if self._prefilling or (self.waiting and not self.policy.bursts.although_requests_wait):
            return 1
        if slots.constrained[decoding].any():  # the mask of a step needs the token of the one before it
            return 1
        num_steps = min(max_steps, int((slots.max_num_tokens[decoding] - slots.num_scheduled_tokens[decoding]).min()))
        num_blocks = -(-(slots.num_computed_tokens[decoding] + num_steps - 1) // size)
        needed = num_blocks - self.kv.num_blocks[decoding]
        if num_steps < 2 or needed.sum() * self.kv.num_groups > self.pool.num_free:
            return 1
        self.kv.append_blocks(decoding, needed)
        slots.num_computed_tokens[decoding] += num_steps - 1
        return num_steps

    # --------------------------------------------------------------------------------------------------------- blocks

    def allocate_decode_blocks(self) -> bool:
        """Allocate the block of each decoding slot's next token; returns whether requests were preempted for it."""
        slots, kv = self.slots, self.kv
        blocks_are_full = slots.num_computed_tokens == kv.num_blocks * self.config.block_size
        needing = np.flatnonzero(self._is_decode() & blocks_are_full)
        if kv.has_windows:
            self._free_before_windows(needing.tolist())
        if len(needing) * kv.num_groups <= self.pool.num_free:
            kv.append_blocks(needing)
            return False
        unserved = set(needing.tolist())
        for slot in list(slots.admission_order):
            if slot in unserved and slots.live[slot] and self._preempt_until_free(slot, kv.num_groups):
                kv.append_blocks(np.array([slot]))
        return True

    def allocate_window_blocks(self) -> bool:
        """Allocate the next window blocks of prefills in progress; returns whether requests were preempted for it.

        Prefills free at least as many blocks as they take, unless other requests share those.
        """
        if not self.kv.has_windows:
            return False
        before = self.counters.num_preemptions
        self._free_before_windows(self._prefilling)
        for slot in list(self._prefilling):
            if self.slots.live[slot] and self._preempt_until_free(slot, self.kv.num_window_blocks_needed(slot)):
                self.kv.allocate_window_blocks(slot)
        return self.counters.num_preemptions > before

    def _free_before_windows(self, slots: Iterable[int]) -> None:
        """Free blocks that no later step attends to, however many draft tokens are accepted."""
        columns = self.slots
        for slot in slots:
            position = min(int(columns.num_computed_tokens[slot]), int(columns.num_tokens[slot]) - 1)
            self.kv.free_before_window(slot, position)

    def _preempt_until_free(self, slot: int, num_blocks: int) -> bool:
        """Preempt requests until `num_blocks` are free; False if `slot` itself was preempted."""
        while self.pool.num_free < num_blocks and self.slots.live[slot]:
            self._preempt(self.policy.queue_order.choose_victim(self.slots))
        return bool(self.slots.live[slot])

    def _preempt(self, slot: int) -> None:
        """Free a slot and put its request back into the queue, to be recomputed or found in the prefix cache later."""
        self.counters.num_lost_tokens += int(self.slots.num_computed_tokens[slot])
        request = self._free_slot(slot)
        request.num_preemptions += 1
        request.preempted_at = self._now
        self.counters.num_preemptions += 1
        self.waiting.appendleft(request)

    # ------------------------------------------------------------------------------------------------------ admission

    def admit_waiting(self, budget: int, chunks: Chunks, now: float) -> None:
        """Admit waiting requests in order while there are slots, budget, and blocks for their whole known sequence."""
        while self.waiting and budget > 0 and self.slots.has_free:
            request = self.waiting[0]
            num_tokens = len(request.tokens)
            prefix = self._find_cached_prefix(request, num_tokens)
            num_cached = prefix.num_blocks * self.config.block_size
            num_reserved = self.policy.watermark.num_reserved_blocks(self.slots.num_running)
            if self.kv.num_blocks_needed(num_tokens, prefix) + num_reserved > self.pool.num_free:
                break
            if not self._chunk_size(request, num_cached, num_tokens - num_cached, budget):
                break
            self.waiting.popleft()
            slot = self.slots.assign(request, num_cached)
            self.kv.allocate(slot, num_tokens, prefix)
            self.slots.num_cached_blocks[slot] = prefix.num_blocks
            self._builder.assign_slot(slot, request, num_cached)
            self._count_admission(request, num_cached, now)
            self._prefilling[slot] = None
            budget -= self._schedule_chunk(slot, budget, chunks)

    def _find_cached_prefix(self, request: Request, num_tokens: int) -> CachedPrefix:
        """Cached leading blocks. At least the last token is computed, since its logits are needed."""
        if not (self.config.enable_prefix_caching and request.reads_prefix_cache):
            return self.kv.empty_prefix()
        return self.kv.find_cached_prefix(request.block_hashes[: (num_tokens - 1) // self.config.block_size])

    def _count_admission(self, request: Request, num_cached: int, now: float) -> None:
        if request.was_admitted:
            request.resume(now)
            return
        request.was_admitted = True
        if self.config.enable_prefix_caching and request.reads_prefix_cache:
            self.counters.prefix_queries += request.num_prompt_tokens
            self.counters.prefix_hits += num_cached
        self.counters.prompt_tokens += request.num_prompt_tokens
        # With inputs, the core may have replaced the placeholders: the front end does not know the length then.
        tokens = request.num_prompt_tokens if request.mm_inputs_end else 0
        self.admitted.append(Admitted(request.handle, num_cached, now - request.arrived, tokens))

    def _schedule_chunk(self, slot: int, budget: int, chunks: Chunks) -> int:
        """Schedule as much of a slot's prefill as the budget allows, and cache the prompt blocks that it fills."""
        slots = self.slots
        start = int(slots.num_computed_tokens[slot])
        num_owed = int(slots.num_scheduled_tokens[slot]) - start
        request = slots.requests[slot]
        assert request is not None, f"slot {slot} has no request"
        count = self._chunk_size(request, start, num_owed, budget)
        if count:
            chunks.append((slot, count))
            slots.num_computed_tokens[slot] += count
            if request.message.mm_inputs:
                self.encoder_cache.schedule_inputs(request, start, count)
                self.encoder_cache.free_passed_inputs(request, start + count)
            self._cache_full_blocks(slot, int(min(slots.num_computed_tokens[slot], slots.num_tokens[slot])))
            if count == num_owed:
                self._prefilling.pop(slot, None)
        return count

    def _chunk_size(self, request: Request, start: int, num_owed: int, budget: int) -> int:
        """How many of the `num_owed` tokens from position `start` on the next step computes."""
        count = min(num_owed, budget)
        if request.message.mm_inputs:
            count = self.encoder_cache.num_schedulable_tokens(request, start, count)
        return self.policy.chunking.chunk_size(num_owed, count)

    # --------------------------------------------------------------------------------------------------------- update

    def update(self, step: ScheduledStep, result: StepResult) -> StepOutcome:
        """Book the tokens of a step; tokens of slots that have another request by now are dropped."""
        slots = self.slots
        finished = self._end_reported(result.reports) if result.reports else []
        scored = slots.with_handles(result.prompt_logprobs) if result.prompt_logprobs else ()
        kept = slots.generation[step.slots] == step.generations
        at = step.slots[kept]
        handles, counts = slots.handle[at], None
        if self._drafts is None:
            tokens = int32s(result.tokens)
            assert len(tokens) == len(step.slots), f"step {step.step}: {len(tokens)} tokens for {len(step.slots)} slots"
            tokens = tokens[kept]
            slots.tokens[at, slots.num_tokens[at]] = tokens
            slots.num_tokens[at] += 1
            stopped = slots.find_stopped(at, tokens)
        else:
            kept, counts, stopped = self._drafts.book_result(at, kept, result)
            tokens = int32s(result.tokens)[kept]
        self.counters.generation_tokens += len(tokens)
        hit_stop_id = stopped.copy()
        failed = advance(slots, at, counts, stopped)
        ended = stopped | (slots.num_tokens[at] >= slots.max_num_tokens[at])
        ended[list(failed)] = True
        for index in np.flatnonzero(ended).tolist():
            slot = int(at[index])
            last = int(slots.tokens[slot, slots.num_tokens[slot] - 1])
            request = self._free_slot(slot)
            reason, cause = FinishReason.STOP if stopped[index] else FinishReason.LENGTH, ""
            if index in failed:
                reason, cause = failed[index]
            finished.append(self._finish(request, reason, last if hit_stop_id[index] else -1, cause))
        return StepOutcome(handles, tokens, kept, finished, counts, scored)

    def _end_reported(self, reports: StepReports) -> list[Finished]:
        """End requests that workers can't compute, unless they have ended."""
        slots, failures = self.slots, self.encoder_cache.failures(reports.encoded)
        ended = [self.end(self.requests[one], FinishReason.NOT_ENCODED, cause) for one, cause in failures.items()]
        self.encoder_cache.confirm(reports.encoded)
        for slot, generation in int32s(reports.rejected, 2).tolist():
            request = slots.requests[slot]
            if request is not None and slots.generation[slot] == generation:
                cause = f"the workers don't have the adapter {request.adapter}"
                ended.append(self.end(request, FinishReason.FAILED, cause))
        return ended

    def end(self, request: Request, reason: FinishReason, error: str = "") -> Finished:
        """End a request, waiting or running."""
        if request.slot >= 0:
            self._free_slot(request.slot)
        else:
            self.waiting.remove(request)
        return self._finish(request, reason, error=error)

    def _finish(self, request: Request, reason: FinishReason, stop_id: int = -1, error: str = "") -> Finished:
        del self.requests[request.handle]
        if request.message.mm_inputs:
            if (unsure := self.encoder_cache.unregister(request)) is not None:
                self.kv.forget(request.block_hashes[unsure // self.config.block_size :])
            self.features.release(request.handle)
        return Finished(request.handle, reason, stop_id, error, request.num_preemptions, preempted=request.preempted)

    def _free_slot(self, slot: int) -> Request:
        # Generated blocks enter the prefix cache only now, so that no decode step spends time on it. The KV of the
        # newest token isn't written yet.
        slots = self.slots
        self._cache_full_blocks(slot, int(min(slots.num_tokens[slot] - 1, slots.num_computed_tokens[slot])))
        self.kv.free(slot)
        if slots.mm_inputs_end[slot]:
            self.encoder_cache.free_request(slots.requests[slot])  # type: ignore[arg-type]
        self._prefilling.pop(slot, None)
        self._builder.free_slot(slot)
        return slots.free(slot)

    def _cache_full_blocks(self, slot: int, num_tokens: int) -> None:
        """Cache the blocks that the first `num_tokens` tokens fill. Their ids are final; their KV is being written."""
        slots, size = self.slots, self.config.block_size
        num_full, num_cached = num_tokens // size, int(slots.num_cached_blocks[slot])
        if num_full <= num_cached or not self.config.enable_prefix_caching:
            return
        request = slots.requests[slot]
        assert request is not None, f"slot {slot} has no request"
        if len(request.block_hashes) < num_full:
            tokens = slots.tokens[slot, : num_full * size].data.cast("B")
            extend_hashes(request.block_hashes, request.hash_root, tokens, size, request.mm_block_keys)
        self.kv.cache_blocks(slot, request.block_hashes, num_cached, num_full)
        slots.num_cached_blocks[slot] = num_full

    # ---------------------------------------------------------------------------------------------------- maintenance

    def reset_prefix_cache(self) -> int:
        """Empty the prefix cache; returns how many blocks were cached."""
        return self.kv.reset_cache()

    def check(self) -> None:
        """Assert the invariants between steps."""
        slots = self.slots
        self.kv.check([*slots.admission_order])
        slots.check(self.kv.num_blocks, self.config.block_size)
        self.encoder_cache.check([request for request in self.requests.values() if request.slot >= 0])
        held = {request.handle for request in self.waiting} | {int(slots.handle[s]) for s in slots.admission_order}
        assert held == set(self.requests), "requests, slots and the waiting queue disagree"
