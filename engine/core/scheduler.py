"""The scheduler: one token budget a step, no distinction between prefill and decode.

`schedule()` plans a step and books it at once as computed; `update()` books the tokens when they arrive. Several steps
may be planned ahead of their results: the table of rows says what is confirmed and what is on its way. What V0 did
otherwise are other methods, bound when the scheduler is made (see `engine.core.policy`).
"""

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from engine.config import ResolvedConfig
from engine.core.changes import Changes, WholeState
from engine.core.drafts import Drafts
from engine.core.hashing import extend_hashes
from engine.core.items import Items
from engine.core.kv import KVTables, Prefix
from engine.core.plan import Booked, Plan
from engine.core.policy import Policy, make_queue, urgency
from engine.core.request import Request
from engine.core.rows import Rows
from engine.messages import Admitted, Finished, FinishReason, PromptLogprobs, Stats, StepResult, int32s


class Scheduler:
    """Decides each step's work; knows requests, rows and blocks, and nothing of models or sockets."""

    def __init__(self, config: ResolvedConfig):
        self.config = config
        self.rows = Rows(config.max_num_seqs, config.max_model_len)
        self.policy = policy = Policy.of(config)
        self.waiting = make_queue(policy)
        self.requests: dict[int, Request] = {}
        self.admitted: list[Admitted] = []  # since the caller last took them
        self.preemptions = self.tokens_lost = 0
        self.prefix_queries = self.prefix_hits = 0
        self.prompt_tokens = self.generation_tokens = 0
        self.steps = self.step_tokens = 0
        self._prefilling: dict[int, None] = {}  # rows owed more than one token, oldest first
        self.items = Items.of(config)
        self._drafts = Drafts(self.rows, config.draft_tokens, config.block_size) if config.draft_tokens else None
        self._changes = (WholeState if policy.full_state else Changes)(self.rows, self.items)
        self.kv = KVTables(config, self.rows, self._changes.append_block)
        self.pool = self.kv.pool
        self._select = self._prefill_first if policy.prefill_first else self._mixed
        # Only windows are followed.
        self._slide: Callable[[], bool] = self._follow_windows if self.kv.windowed else lambda: False
        self._shed: Callable[[Iterable[int]], None] = self._give_back if self.kv.windowed else lambda _: None
        self._victim: Callable[[], int] = self._least_urgent if policy.priority else self._newest

    # ------------------------------------------------------------------------------------------------------- requests

    def refusal(self, request: Request) -> str | None:
        """Why a request can't be served, whatever else runs; None if it can. From any thread."""
        refusal = request.refusal(self.config, whole=self.policy.whole_prompts)
        return self.items.refusal(request) if refusal is None and request.message.items else refusal

    def add(self, request: Request) -> Finished | None:
        """Queue a request; a Finished means that it can't be served, and why."""
        refusal = self.refusal(request)
        if request.handle in self.requests:
            refusal = f"handle {request.handle} is in use"
        if refusal is None and request.message.items:
            refusal = self.items.enter(request)
        if refusal is not None:
            return Finished(request.handle, FinishReason.ERROR, error=refusal)
        self.requests[request.handle] = request
        self.waiting.append(request)
        return None

    def abort(self, handle: int) -> Finished | None:
        """End a request wherever it is; None if it has ended already."""
        request = self.requests.get(handle)
        if request is None:
            return None
        if request.row >= 0:
            self._free_row(request.row)
        else:
            self.waiting.remove(request)
        return self._finish(request, FinishReason.ABORT)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything; rows to be removed count, so that workers hear of them."""
        return bool(self.waiting or self.rows.running or self._changes.urgent)

    def stats(self, last_step_at: float) -> Stats:
        return Stats(
            running=self.rows.running,
            waiting=len(self.waiting),
            kv_use=self.pool.use,
            preemptions=self.preemptions,
            prefix_queries=self.prefix_queries,
            prefix_hits=self.prefix_hits,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            steps=self.steps,
            step_tokens=self.step_tokens,
            last_step_at=last_step_at,
            drafted=self._drafts.drafted if self._drafts else 0,
            accepted=self._drafts.accepted if self._drafts else 0,
        )

    # ------------------------------------------------------------------------------------------------------- schedule

    def schedule(self, now: float, burst: int = 1) -> Plan | None:
        """Plan the next step, or as many as `burst` of them at once if only decodes follow each other.

        None if there is nothing to compute and nothing to tell the workers.
        """
        rows = self.rows
        chunks: list[tuple[int, int]] = []
        decoding = self._select(chunks, now)
        scheduled = np.zeros(rows.count, np.bool_)
        scheduled[decoding] = True
        for row, _ in chunks:
            scheduled[row] = True
        num_tokens = len(decoding) + sum(n for _, n in chunks)
        if not num_tokens and not self._changes.urgent:
            return None
        sampling = np.flatnonzero(scheduled & (rows.computed == rows.upper))
        steps = self._lengthen(decoding, burst) if burst > 1 and not chunks and num_tokens else 1
        if self._drafts is None:
            rows.upper[sampling] += steps
        else:
            self._drafts.planned(sampling)
        message = self._changes.message(self.steps + 1, scheduled, chunks, steps)
        self.steps += steps
        self.step_tokens = num_tokens
        return Plan(message.step, message, sampling, rows.generation[sampling], num_tokens, steps)

    def _mixed(self, chunks: list[tuple[int, int]], now: float) -> NDArray[np.intp]:
        """V1's order, running rows first, decodes and prefill chunks in one budget; returns the rows that decode."""
        rows = self.rows
        preempted = self._slide() | self._grow()
        decoding = self._decode()
        budget = self.config.max_num_batched_tokens - len(decoding)
        assert budget >= 0, f"{len(decoding)} rows decode, the budget is {self.config.max_num_batched_tokens}"
        for row in [row for row in self._prefilling if rows.computed[row] == rows.upper[row]]:
            del self._prefilling[row]  # its last prompt token was one more decode
        budget = self._continue(budget, chunks)
        if not preempted:
            self._admit(budget, chunks, now)
        return decoding

    def _prefill_first(self, chunks: list[tuple[int, int]], now: float) -> NDArray[np.intp]:
        """V0's order: while there are prompts to compute, nothing else is."""
        preempted = self._slide()
        budget = self._continue(self.config.max_num_batched_tokens, chunks)
        if not preempted:
            self._admit(budget, chunks, now)
        if chunks:
            return np.empty(0, np.intp)
        self._grow()
        return self._decode()

    def _continue(self, budget: int, chunks: list[tuple[int, int]]) -> int:
        """Go on with the prefills under way; returns what is left of the budget for newcomers."""
        held_back = False
        for row in list(self._prefilling):
            spent = self._chunk(row, budget, chunks)
            held_back |= spent == 0
            budget -= spent
        # Who waits for room in the encoder cache gets it before anyone who comes later.
        return 0 if held_back else budget

    def _decode(self) -> NDArray[np.intp]:
        decoding = np.flatnonzero(self._decoding())
        self.rows.computed[decoding] += 1
        return decoding

    def _lengthen(self, decoding: NDArray[np.intp], burst: int) -> int:
        """How many steps these rows take in one go, this one included; the blocks for it are handed out.

        No row gets past its limit, so that only a stop token leaves tokens to drop; and nobody is preempted for it.
        """
        if self._prefilling or (self.waiting and self.policy.bursts):
            return 1
        rows, size = self.rows, self.config.block_size
        steps = min(burst, int((rows.limit[decoding] - rows.upper[decoding]).min()))
        need = -(-(rows.computed[decoding] + steps - 1) // size) - rows.num_blocks[decoding]
        if steps < 2 or need.sum() * self.kv.groups > self.pool.free_count:
            return 1
        self.kv.append(np.repeat(decoding, need).tolist())
        rows.num_blocks[decoding] += need
        rows.computed[decoding] += steps - 1
        return steps

    def _decoding(self) -> NDArray[np.bool_]:
        """Rows that are owed exactly one token, none of an item, and may still sample."""
        rows = self.rows
        owed_one = (rows.upper - rows.computed == 1) & (rows.computed >= rows.items_end)
        return rows.live & owed_one & (rows.upper < rows.limit)

    def _grow(self) -> bool:
        """Give each decoding row a block for its next token, preempting the newest rows where none is free."""
        rows, size = self.rows, self.config.block_size
        need = np.flatnonzero(self._decoding() & (rows.computed == rows.num_blocks * size))
        self._shed(need)
        if len(need) * self.kv.groups <= self.pool.free_count:
            self.kv.append(need.tolist())
            rows.num_blocks[need] += 1
            return False
        wanting = set(need.tolist())
        for row in list(rows.order):
            if row not in wanting or not rows.live[row]:
                continue
            if self._make_room(row, self.kv.groups):
                self.kv.append([row])
                rows.num_blocks[row] += 1
        return True

    def _follow_windows(self) -> bool:
        """Have windows follow the rows whose prefill goes on, preempting the newest rows if they don't find room.

        They give back at least what they take, unless others share it. Returns whether anything was preempted.
        """
        before = self.preemptions
        self._shed(self._prefilling)
        for row in list(self._prefilling):
            if not self.rows.live[row]:
                continue
            total = int(self.rows.num_blocks[row])
            if self._make_room(row, self.kv.lacks(row, total)):
                self.kv.follow(row, total)
        return self.preemptions > before

    def _make_room(self, row: int, blocks: int) -> bool:
        """Preempt the newest rows until so many blocks are free; False if the row itself had to go."""
        while self.pool.free_count < blocks and self.rows.live[row]:
            self._preempt(self._victim())
        return bool(self.rows.live[row])

    def _give_back(self, rows: Iterable[int]) -> None:
        """Give back blocks that no step to come sees, whatever becomes of guesses."""
        for row in rows:
            self.kv.shed(row, min(int(self.rows.computed[row]), int(self.rows.known[row]) - 1))

    def _newest(self) -> int:
        return next(reversed(self.rows.order))

    def _least_urgent(self) -> int:
        owner = self.rows.owner
        return max(self.rows.order, key=lambda row: urgency(owner[row]))  # type: ignore[arg-type]

    def _chunk(self, row: int, budget: int, chunks: list[tuple[int, int]]) -> int:
        """Schedule as much of a row's prefill as the budget allows, and name the prompt blocks it fills."""
        rows = self.rows
        start = int(rows.computed[row])
        owed = int(rows.upper[row]) - start
        request = rows.owner[row]
        assert request is not None, f"row {row} has no owner"
        count = self._clip(request, start, owed, budget)
        if count:
            chunks.append((row, count))
            rows.computed[row] += count
            if request.message.items:
                self.items.reserve(request, start, count)
                self.items.computed(request, start + count)
            self._publish(row, int(min(rows.computed[row], rows.known[row])))
            if count == owed:
                self._prefilling.pop(row, None)
        return count

    def _clip(self, request: Request, start: int, owed: int, budget: int) -> int:
        """How many of the `owed` tokens from `start` on the coming step computes."""
        count = min(owed, budget)
        if request.message.items:
            count = self.items.clip(request, start, count)
        return 0 if self.policy.whole_prompts and count < owed else count

    def _admit(self, budget: int, chunks: list[tuple[int, int]], now: float) -> None:
        """Admit waiting requests in order while rows, budget and blocks for their whole known sequence are there."""
        while self.waiting and budget > 0 and self.rows.has_free:
            request = self.waiting[0]
            length, size = len(request.tokens), self.config.block_size
            prefix = self._find_prefix(request, length)
            cached = prefix.count * size
            reserved = self.policy.reserved_blocks if self.rows.running else 0
            if self.kv.wanted(length, prefix) + reserved > self.pool.free_count:
                break
            if not self._clip(request, cached, length - cached, budget):
                break
            self.waiting.popleft()
            row = self.rows.take(request, cached, -(-length // size))
            self.kv.take(row, length, prefix)
            self.rows.published[row] = prefix.count
            self._changes.add(row, request, cached)
            self._count_admission(request, cached, now)
            self._prefilling[row] = None
            budget -= self._chunk(row, budget, chunks)

    def _find_prefix(self, request: Request, length: int) -> Prefix:
        """Cached leading blocks; at least one token is left to compute, since its logits are needed."""
        if not (self.config.enable_prefix_caching and request.reads_cache):
            return self.kv.nothing()
        return self.kv.find(request.block_hashes[: (length - 1) // self.config.block_size])

    def _count_admission(self, request: Request, cached: int, now: float) -> None:
        if request.started:
            return
        request.started = True
        if self.config.enable_prefix_caching and request.reads_cache:
            self.prefix_queries += request.prompt_len
            self.prefix_hits += cached
        self.prompt_tokens += request.prompt_len
        self.admitted.append(Admitted(request.handle, cached, now - request.arrived))

    def _preempt(self, row: int) -> None:
        """Take a row's blocks and put its request back in front; it will be recomputed, or found in the cache."""
        self.tokens_lost += int(self.rows.computed[row])
        request = self._free_row(row)
        request.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(request)

    def _free_row(self, row: int) -> Request:
        # What was generated is named all at once, now that others may ask for it: no decode step pays for the cache.
        # The KV of the newest token isn't written yet.
        self._publish(row, int(min(self.rows.known[row] - 1, self.rows.computed[row])))
        self.kv.release(row)
        if self.rows.items_end[row]:
            self.items.release(self.rows.owner[row])  # type: ignore[arg-type]
        self._prefilling.pop(row, None)
        self._changes.remove(row)
        return self.rows.give_back(row)

    # --------------------------------------------------------------------------------------------------------- update

    def update(self, plan: Plan, result: StepResult) -> Booked:
        """Book the tokens of a step; those of rows that changed hands meanwhile are dropped."""
        rows = self.rows
        finished = self._end_refused(result.refused) if result.refused else []
        scored = self._name_owners(result.prompt_logprobs) if result.prompt_logprobs else ()
        kept = rows.generation[plan.rows] == plan.generations
        at = plan.rows[kept]
        handles, counts = rows.handle[at], None
        if self._drafts is None:
            tokens = int32s(result.tokens)
            assert len(tokens) == len(plan.rows), f"step {plan.step}: {len(tokens)} tokens for {len(plan.rows)} rows"
            tokens = tokens[kept]
            rows.tokens[at, rows.known[at]] = tokens
            rows.known[at] += 1
            stopped = rows.stopped(at, tokens)
        else:
            kept, counts, stopped = self._drafts.book(at, kept, result)
            tokens = int32s(result.tokens)[kept]
        self.generation_tokens += len(tokens)
        ended = stopped | (rows.known[at] >= rows.limit[at])
        for index in np.flatnonzero(ended).tolist():
            row = int(at[index])
            last = int(rows.tokens[row, rows.known[row] - 1])
            request = self._free_row(row)
            reason = FinishReason.STOP if stopped[index] else FinishReason.LENGTH
            finished.append(self._finish(request, reason, last if stopped[index] else -1))
        return Booked(handles, tokens, kept, finished, counts, scored)

    def _name_owners(self, scored: Iterable[PromptLogprobs]) -> tuple[PromptLogprobs, ...]:
        """With handles in place of rows; those of rows that changed hands meanwhile are dropped."""
        rows = self.rows
        return tuple(
            PromptLogprobs(int(rows.handle[one.owner]), one.generation, one.logprobs)
            for one in scored
            if rows.generation[one.owner] == one.generation
        )

    def _end_refused(self, refused: bytes) -> list[Finished]:
        """End requests that workers can't compute, unless they have lost their rows meanwhile."""
        found = [
            self._free_row(row)
            for row, generation in int32s(refused, 2).tolist()
            if self.rows.live[row] and self.rows.generation[row] == generation
        ]
        error = "the workers don't have the adapter {}".format
        return [self._finish(one, FinishReason.FAILED, error=error(one.adapter)) for one in found]

    def _finish(self, request: Request, reason: FinishReason, stop_id: int = -1, error: str = "") -> Finished:
        del self.requests[request.handle]
        if request.message.items:
            self.items.leave(request)
        return Finished(request.handle, reason, stop_id, error, request.preemptions)

    def _publish(self, row: int, tokens: int) -> None:
        """Name the row's blocks that its first `tokens` tokens fill; their ids are final, their KV is on its way."""
        rows, size = self.rows, self.config.block_size
        full, named = tokens // size, int(rows.published[row])
        if full <= named or not self.config.enable_prefix_caching:
            return
        request = rows.owner[row]
        assert request is not None, f"row {row} has no owner"
        if len(request.block_hashes) < full:
            named_tokens = rows.tokens[row, : full * size].data.cast("B")
            extend_hashes(request.block_hashes, request.root, named_tokens, size, request.item_keys)
        self.kv.publish(row, request.block_hashes, named, full)
        rows.published[row] = full

    # --------------------------------------------------------------------------------------------------------- upkeep

    def reset_prefix_cache(self) -> int:
        """Forget all cached content; returns how many blocks were cached."""
        count = len(self.pool.block_of)
        self.pool.forget_all()
        return count

    def check(self) -> None:
        """Assert what must hold between steps."""
        rows = self.rows
        self.kv.check([*rows.order])
        for row in rows.order:
            assert rows.live[row], f"row {row} is in order but not live"
            assert rows.computed[row] <= rows.num_blocks[row] * self.config.block_size, f"row {row} outran its blocks"
            assert rows.known[row] <= rows.upper[row] <= rows.limit[row], f"row {row}: {rows.upper[row]} above limit"
        self.items.check([request for request in self.requests.values() if request.row >= 0])
        assert int(rows.live.sum()) == len(rows.order), "live rows and their order disagree"
        held = {request.handle for request in self.waiting} | {int(rows.handle[row]) for row in rows.order}
        assert held == set(self.requests), "requests, rows and the waiting queue disagree"
