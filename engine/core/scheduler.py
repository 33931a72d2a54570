"""The scheduler: one token budget a step, no distinction between prefill and decode.

`schedule()` plans a step and books it at once as computed; `update()` books the tokens when they arrive. Several steps
may be planned ahead of their results: the table of rows says what is confirmed and what is on its way.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.config import ResolvedConfig
from engine.core.blocks import BlockPool
from engine.core.hashing import extend_hashes
from engine.core.request import Request
from engine.core.rows import Rows
from engine.messages import Admitted, Finished, FinishReason, RowAdded, Stats, StepMessage, StepResult, column, int32s

KV_GROUP = 0


@dataclass(slots=True)
class Plan:
    """One step under way: what was sent, and which rows its result speaks of."""

    step: int
    message: StepMessage
    rows: NDArray[np.intp]  # rows that sample, ascending
    generations: NDArray[np.int32]
    num_tokens: int


@dataclass(slots=True)
class Booked:
    """What a result meant: the rows whose token counts, in the result's order, and who is done."""

    handles: NDArray[np.int64]
    tokens: NDArray[np.int32]
    kept: NDArray[np.bool_]  # over the result's tokens
    finished: list[Finished]


@dataclass(slots=True)
class _Changes:
    """What the next step message will say."""

    removed: list[int] = field(default_factory=list)
    added: list[RowAdded] = field(default_factory=list)
    blocks: list[tuple[int, int, int]] = field(default_factory=list)
    chunks: list[tuple[int, int]] = field(default_factory=list)


class Scheduler:
    """Decides each step's work; knows requests, rows and blocks, and nothing of models or sockets."""

    def __init__(self, config: ResolvedConfig):
        self.config = config
        self.rows = Rows(config.max_num_seqs, config.max_model_len)
        self.pool = BlockPool(config.num_blocks)
        self.waiting: deque[Request] = deque()
        self.requests: dict[int, Request] = {}
        self.admitted: list[Admitted] = []  # since the caller last took them
        self.preemptions = self.tokens_lost = 0
        self.prefix_queries = self.prefix_hits = 0
        self.prompt_tokens = self.generation_tokens = 0
        self.steps = self.step_tokens = 0
        self._prefilling: dict[int, None] = {}  # rows owed more than one token, oldest first
        self._changes = _Changes()

    # ------------------------------------------------------------------------------------------------------- requests

    def add(self, request: Request) -> Finished | None:
        """Queue a request; a Finished means that it can't be served, and why."""
        if request.handle in self.requests:
            return Finished(request.handle, FinishReason.ERROR, error=f"handle {request.handle} is in use")
        if not 0 < request.prompt_len < self.config.max_model_len:
            error = f"the prompt has {request.prompt_len} tokens; 1 to {self.config.max_model_len - 1} can be served"
            return Finished(request.handle, FinishReason.ERROR, error=error)
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
        return bool(self.waiting or self.rows.running or self._changes.removed)

    def stats(self, now: float) -> Stats:
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
            last_step_at=now,
        )

    # ------------------------------------------------------------------------------------------------------- schedule

    def schedule(self, now: float) -> Plan | None:
        """Plan the next step; None if there is nothing to compute and nothing to tell the workers."""
        rows = self.rows
        preempted = self._grow()
        decoding = np.flatnonzero(self._decoding())
        budget = self.config.max_num_batched_tokens - len(decoding)
        assert budget >= 0, f"{len(decoding)} rows decode, the budget is {self.config.max_num_batched_tokens}"
        scheduled = np.zeros(rows.count, np.bool_)
        scheduled[decoding] = True
        rows.computed[decoding] += 1
        chunks: list[tuple[int, int]] = []
        for row in list(self._prefilling):
            if scheduled[row]:  # its last prompt token was one more decode
                del self._prefilling[row]
            else:
                budget -= self._chunk(row, budget, chunks)
        if not preempted:
            budget = self._admit(budget, chunks, now)
        for row, _ in chunks:
            scheduled[row] = True
        changes, self._changes = self._changes, _Changes()
        num_tokens = len(decoding) + sum(n for _, n in chunks)
        if not num_tokens and not changes.removed:
            return None
        resting = np.flatnonzero(rows.live & ~scheduled)
        changes.chunks = [(row, n) for row, n in chunks if n != 1] + [(row, 0) for row in resting.tolist()]
        sampling = np.flatnonzero(scheduled & (rows.computed == rows.upper))
        rows.upper[sampling] += 1
        self.steps += 1
        self.step_tokens = num_tokens
        message = StepMessage(
            step=self.steps,
            removed=column(changes.removed),
            added=tuple(changes.added),
            blocks=column(changes.blocks),
            chunks=column(changes.chunks),
        )
        return Plan(self.steps, message, sampling, rows.generation[sampling], num_tokens)

    def _decoding(self) -> NDArray[np.bool_]:
        """Rows that are owed exactly one token and may still sample."""
        rows = self.rows
        return rows.live & (rows.upper - rows.computed == 1) & (rows.upper < rows.limit)

    def _grow(self) -> bool:
        """Give each decoding row a block for its next token, preempting the newest rows where none is free."""
        rows, size = self.rows, self.config.block_size
        need = np.flatnonzero(self._decoding() & (rows.computed == rows.num_blocks * size))
        if len(need) <= self.pool.free_count:
            for row, block in zip(need.tolist(), self.pool.allocate(len(need)), strict=True):
                self._append_block(row, block)
            return False
        wanting = set(need.tolist())
        for row in list(rows.order):
            if row not in wanting or not rows.live[row]:
                continue
            while self.pool.free_count == 0 and rows.live[row]:
                self._preempt(next(reversed(rows.order)))
            if rows.live[row]:
                self._append_block(row, self.pool.allocate(1)[0])
        return True

    def _append_block(self, row: int, block: int) -> None:
        self.rows.blocks[row].append(block)
        self.rows.num_blocks[row] += 1
        self._changes.blocks.append((row, KV_GROUP, block))

    def _chunk(self, row: int, budget: int, chunks: list[tuple[int, int]]) -> int:
        """Schedule as much of a row's prefill as the budget allows, and name the prompt blocks it fills."""
        rows = self.rows
        owed = int(rows.upper[row] - rows.computed[row])
        count = min(owed, budget)
        if count:
            chunks.append((row, count))
            rows.computed[row] += count
            self._publish(row, int(min(rows.computed[row], rows.known[row])))
            if count == owed:
                self._prefilling.pop(row, None)
        return count

    def _admit(self, budget: int, chunks: list[tuple[int, int]], now: float) -> int:
        """Admit waiting requests in order while rows, budget and blocks for their whole known sequence are there."""
        while self.waiting and budget > 0 and self.rows.has_free:
            request = self.waiting[0]
            length, size = len(request.tokens), self.config.block_size
            hits = self._find_prefix(request, length)
            need = -(-length // size) - len(hits)
            if need + self.pool.free_among(hits) > self.pool.free_count:
                break
            self.waiting.popleft()
            self.pool.hold(hits)
            row = self.rows.take(request, len(hits) * size, hits + self.pool.allocate(need))
            self.rows.published[row] = len(hits)
            self._tell_added(request, row)
            self._count_admission(request, len(hits) * size, now)
            self._prefilling[row] = None
            budget -= self._chunk(row, budget, chunks)
        return budget

    def _find_prefix(self, request: Request, length: int) -> list[int]:
        """Cached leading blocks; at least one token is left to compute, since its logits are needed."""
        if not self.config.enable_prefix_caching:
            return []
        return self.pool.find(request.block_hashes[: (length - 1) // self.config.block_size])

    def _tell_added(self, request: Request, row: int) -> None:
        rows = self.rows
        self._changes.added.append(
            RowAdded(
                row=row,
                generation=int(rows.generation[row]),
                tokens=request.tokens.tobytes(),
                prompt_len=request.prompt_len,
                computed=int(rows.computed[row]),
                blocks=column(rows.blocks[row]),
                sampling=request.message.sampling,
                adapter=request.message.adapter,
            )
        )

    def _count_admission(self, request: Request, cached: int, now: float) -> None:
        if request.started:
            return
        request.started = True
        if self.config.enable_prefix_caching:
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
        self.pool.release(self.rows.blocks[row])
        self._prefilling.pop(row, None)
        self._changes.removed.append(row)
        if self._changes.blocks:  # it was given one earlier in this very step
            self._changes.blocks = [entry for entry in self._changes.blocks if entry[0] != row]
        return self.rows.give_back(row)

    # --------------------------------------------------------------------------------------------------------- update

    def update(self, plan: Plan, result: StepResult) -> Booked:
        """Book the tokens of a step; those of rows that changed hands meanwhile are dropped."""
        rows = self.rows
        tokens = int32s(result.tokens)
        assert len(tokens) == len(plan.rows), f"step {plan.step}: {len(tokens)} tokens for {len(plan.rows)} rows"
        kept = rows.generation[plan.rows] == plan.generations
        at, tokens = plan.rows[kept], tokens[kept]
        handles = rows.handle[at]
        rows.tokens[at, rows.known[at]] = tokens
        rows.known[at] += 1
        self.generation_tokens += len(at)
        if self.config.enable_prefix_caching:
            # The KV of the newest token isn't written yet, that of all before it is.
            for row in at[(rows.known[at] - 1) & (self.config.block_size - 1) == 0].tolist():
                self._publish(row, int(rows.known[row]) - 1)
        stopped = rows.stopped(at, tokens)
        ended = stopped | (rows.known[at] >= rows.limit[at])
        finished = []
        for index in np.flatnonzero(ended).tolist():
            request = self._free_row(int(at[index]))
            reason = FinishReason.STOP if stopped[index] else FinishReason.LENGTH
            finished.append(self._finish(request, reason, int(tokens[index]) if stopped[index] else -1))
        return Booked(handles, tokens, kept, finished)

    def _finish(self, request: Request, reason: FinishReason, stop_id: int = -1) -> Finished:
        del self.requests[request.handle]
        return Finished(request.handle, reason, stop_id, preemptions=request.preemptions)

    def _publish(self, row: int, tokens: int) -> None:
        """Name the row's blocks that its first `tokens` tokens fill; their ids are final."""
        rows, size = self.rows, self.config.block_size
        full, named = tokens // size, int(rows.published[row])
        if full <= named or not self.config.enable_prefix_caching:
            return
        request = rows.owner[row]
        assert request is not None, f"row {row} has no owner"
        if len(request.block_hashes) < full:
            extend_hashes(request.block_hashes, request.root, rows.tokens[row, : full * size].data.cast("B"), size)
        for index in range(named, full):
            self.pool.publish(rows.blocks[row][index], request.block_hashes[index])
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
        self.pool.check()
        references = [0] * self.pool.num_blocks
        for row in rows.order:
            assert rows.live[row], f"row {row} is in order but not live"
            for block in rows.blocks[row]:
                references[block] += 1
            assert rows.computed[row] <= rows.num_blocks[row] * self.config.block_size, f"row {row} outran its blocks"
            assert rows.known[row] <= rows.upper[row] <= rows.limit[row], f"row {row}: {rows.upper[row]} above limit"
        assert references == self.pool.references, "references don't match the rows' tables"
        assert int(rows.live.sum()) == len(rows.order), "live rows and their order disagree"
        held = {request.handle for request in self.waiting} | {int(rows.handle[row]) for row in rows.order}
        assert held == set(self.requests), "requests, rows and the waiting queue disagree"
