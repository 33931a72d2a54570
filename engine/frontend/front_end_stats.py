"""The counters of front ends for `/metrics`: cheap enough for each token, in memory that processes can share."""

import mmap
import os
import tempfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TypeAlias

import msgspec

from engine.stats import MMStats, SpillStats, Stats

SECONDS_TO_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80, 160)
SECONDS_BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
SECONDS_COMPILING = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SECONDS_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)

REASONS = ("stop", "length", "abort", "error")
# What happens to requests outside of the engine, and to a core: a request that exceeded --request-timeout, one that was
# refused because of --max-queue or --max-requests-per-key, a core that was started again, an output that was ended with
# its replica because a drain had a time limit.
EVENTS = ("timeout", "queue_full", "key_limit", "restart", "drain_timeout")
# Of the feature cache: inputs looked up, those found, bytes of its files. Of the pool: inputs processed, those that
# failed, seconds of its processes, inputs that wait, processes.
MM_COUNTERS = ("queries", "hits", "bytes", "jobs", "failures", "seconds", "waiting", "processes")

# Requests with a grammar, and those whose grammar had been compiled for an earlier one.
GRAMMAR_COUNTERS = ("requests", "hits")

MOST_REPLICAS = 64  # of a server; the memory of one that never was is never touched

# Layout of a block, an array of float64: time of the core's last message, number of cores before this one, stats of the
# core (those of multimodal inputs and of --kv-spill last), counters of the cores before it in the same order, number of
# requests that the core has, tokens left to compute for them, requests that wait until a replica serves, finished
# requests by reason, events, counters of multimodal inputs, counters of grammars, histograms.
_CORE_KINDS: tuple[type, ...] = tuple(field.type for field in msgspec.structs.fields(Stats)[:-2])
_MM_KINDS: tuple[type, ...] = tuple(field.type for field in msgspec.structs.fields(MMStats))
_PART_NAMES = (*MMStats.__struct_fields__, *SpillStats.__struct_fields__)
_CORE_NAMES = (*Stats.__struct_fields__[:-2], *_PART_NAMES)
_COUNTERS = (
    "preemptions", "prefix_queries", "prefix_hits", "prompt_tokens", "generation_tokens", "steps", "num_draft_tokens",
    "num_accepted_tokens", "kv_transfers", "kv_transfers_lost", "kv_blocks_sent", "kv_blocks_received",
    "kv_blocks_rejected",
)  # fmt: skip
_PART_GAUGES = ("mirror_bytes", "encoder_embeddings", "host_blocks", "host_used", "disk_blocks", "disk_used")
_IS_COUNTER = [name in _COUNTERS or (name in _PART_NAMES and name not in _PART_GAUGES) for name in _CORE_NAMES]
_AT, _GENERATION = 0, 1
_CORE = slice(2, 2 + len(_CORE_KINDS))
_CORE_MM = slice(_CORE.stop, _CORE.stop + len(_MM_KINDS))
_CORE_SPILL = slice(_CORE_MM.stop, _CORE_MM.stop + len(SpillStats.__struct_fields__))
_ALL_CORE = slice(_CORE.start, _CORE_SPILL.stop)
_ENDED = slice(_ALL_CORE.stop, _ALL_CORE.stop + len(_CORE_NAMES))
_LIVE = _ENDED.stop
_LOAD = _LIVE + 1
_HELD = _LOAD + 1
_FINISHED = _HELD + 1
_EVENTS = _FINISHED + len(REASONS)
_INPUTS = slice(_EVENTS + len(EVENTS), _EVENTS + len(EVENTS) + len(MM_COUNTERS))
_GRAMMARS = _INPUTS.stop
_HISTOGRAMS = _GRAMMARS + len(GRAMMAR_COUNTERS)

Cells: TypeAlias = "memoryview[float]"


class MMCounters:
    """Counters of the multimodal inputs of one front end: its feature cache, and its pool of processes."""

    __slots__ = ("cells",)

    def __init__(self, cells: "Cells | None" = None):
        """`cells` is their part of a block; None: memory of their own."""
        self.cells: Cells = memoryview(bytearray(8 * len(MM_COUNTERS))).cast("d") if cells is None else cells

    def add(self, name: str, value: float = 1) -> None:
        """Add to one of MM_COUNTERS."""
        self.cells[MM_COUNTERS.index(name)] += value

    def set(self, name: str, value: float) -> None:
        self.cells[MM_COUNTERS.index(name)] = value

    def get(self, name: str) -> float:
        return float(self.cells[MM_COUNTERS.index(name)])


class Histogram:
    """Counts by upper bound. `cells` holds the counts, the last of them above all bounds, then the sum of values."""

    __slots__ = ("bounds", "cells")

    def __init__(self, bounds: tuple[float, ...], cells: Cells):
        assert len(cells) == self.size(bounds), f"{len(cells)} cells for {len(bounds)} bounds"
        self.bounds = bounds
        self.cells = cells

    @staticmethod
    def size(bounds: tuple[float, ...]) -> int:
        return len(bounds) + 2

    def observe(self, value: float) -> None:
        cells = self.cells
        cells[bisect_left(self.bounds, value)] += 1
        cells[-1] += value

    @property
    def counts(self) -> list[int]:
        return [int(count) for count in self.cells[:-1]]

    @property
    def total(self) -> float:
        return float(self.cells[-1])

    def cumulative(self) -> list[tuple[str, float]]:
        """Pairs of an upper bound and the number of values up to it, as Prometheus expects."""
        names = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        return list(zip(names, accumulate(self.counts), strict=True))


_BOUNDS: tuple[tuple[float, ...], ...] = (
    SECONDS_TO_FIRST, SECONDS_BETWEEN, SECONDS_WHOLE, SECONDS_WHOLE, TOKENS, TOKENS, SECONDS_COMPILING, STEP_TOKENS,
)  # fmt: skip
BLOCK_CELLS = _HISTOGRAMS + sum(map(Histogram.size, _BOUNDS))
_STEP_TOKENS = BLOCK_CELLS - Histogram.size(STEP_TOKENS)
BLOCK_BYTES = 8 * BLOCK_CELLS


class FrontEndStats:
    """Counters and histograms of one front end, and the last stats of the core."""

    def __init__(self, cells: "memoryview[float] | None" = None):
        """`cells` is its block of a board; None: memory of its own."""
        self._cells: Cells = memoryview(bytearray(BLOCK_BYTES)).cast("d") if cells is None else cells
        core = self.core  # not zero if this process replaces one that died
        self._tokens = float(core.prompt_tokens + core.generation_tokens)  # of the core, at its last message
        self.ttft, self.itl, self.e2e, self.queue, *others = self._histograms()
        self.prompt_tokens, self.generation_tokens, self.grammar_compilations, self.step_tokens = others
        self.inputs = MMCounters(self._cells[_INPUTS])

    def _histograms(self) -> Iterator[Histogram]:
        begin = _HISTOGRAMS
        for bounds in _BOUNDS:
            end = begin + Histogram.size(bounds)
            yield Histogram(bounds, self._cells[begin:end])
            begin = end

    def record_core(self, at: float, stats: Stats) -> None:
        """Keep the core's stats; the growth of its token counters since the last message is one step."""
        tokens = stats.prompt_tokens + stats.generation_tokens
        if tokens > self._tokens:
            self.step_tokens.observe(tokens - self._tokens)
            self._tokens = tokens
        self._cells[_AT] = at
        self._write_core(stats)

    def _write_core(self, stats: Stats) -> None:
        cells = self._cells
        *numbers, mm, spill = msgspec.structs.astuple(stats)
        for index, value in enumerate(numbers, _CORE.start):
            cells[index] = value
        for part, begin in ((mm, _CORE_MM.start), (spill, _CORE_SPILL.start)):
            if part is not None:
                for index, value in enumerate(msgspec.structs.astuple(part), begin):
                    cells[index] = value

    def core_replaced(self) -> None:
        """A new core counts from zero; what the earlier ones counted is kept."""
        cells = self._cells
        for index, value in enumerate(self._ended_counters(cells[_GENERATION] + 1), _ENDED.start):
            cells[index] = value
        for name, index in zip(_CORE_NAMES, range(_ALL_CORE.start, _ALL_CORE.stop), strict=True):
            if name != "last_step_at":
                cells[index] = 0.0
        cells[_GENERATION] += 1
        cells[_AT] = self._tokens = 0.0

    def _ended_counters(self, generation: float) -> list[float]:
        """What the cores before the one of this number counted, if that is the last one that this front end knows, or
        the next."""
        cells = self._cells
        if cells[_GENERATION] == generation:
            return list(cells[_ENDED])
        return [
            ended + (now if counts else 0.0)
            for ended, now, counts in zip(cells[_ENDED], cells[_ALL_CORE], _IS_COUNTER, strict=True)
        ]

    def begin_as(self, other: "FrontEndStats") -> None:
        """Take over what another front end knows of the core; nothing is open any longer."""
        for index in range(_LIVE):
            self._cells[index] = other._cells[index]
        self.live, self.load, self.held = 0, 0.0, 0

    @property
    def core(self) -> Stats:
        """The last stats of the core that runs now."""
        return _stats(self._cells[_ALL_CORE])

    @property
    def all_cores(self) -> Stats:
        """The same, with counters that include those of the cores before it."""
        cells = self._cells
        pairs = zip(cells[_ALL_CORE], cells[_ENDED], strict=True)
        return _stats([now + ended for now, ended in pairs])

    @property
    def live(self) -> int:
        """Requests of the front end that the core has."""
        return int(self._cells[_LIVE])

    @live.setter
    def live(self, count: int) -> None:
        self._cells[_LIVE] = count

    @property
    def load(self) -> float:
        """Tokens left to compute for them, as the router estimates."""
        return float(self._cells[_LOAD])

    @load.setter
    def load(self, tokens: float) -> None:
        self._cells[_LOAD] = tokens

    @property
    def held(self) -> int:
        """Requests that wait at the front end until a replica serves; a router counts them for its first replica."""
        return int(self._cells[_HELD])

    @held.setter
    def held(self, count: int) -> None:
        self._cells[_HELD] = count

    @property
    def num_open(self) -> int:
        """Requests that have arrived and not ended."""
        return self.live + self.held

    @property
    def num_waiting(self) -> int:
        """Of these, those that are not in a batch slot, as far as the core has reported."""
        return self.core.waiting + self.held

    def count_finished(self, reason: str) -> None:
        self._cells[_FINISHED + REASONS.index(reason)] += 1

    @property
    def finished(self) -> Counter[str]:
        """Finished requests by reason."""
        counts = self._cells[_FINISHED:_EVENTS]
        return Counter({reason: int(count) for reason, count in zip(REASONS, counts, strict=True) if count})

    def count_event(self, event: str, count: int = 1) -> None:
        """Count one of EVENTS."""
        self._cells[_EVENTS + EVENTS.index(event)] += count

    def events(self, event: str) -> int:
        return int(self._cells[_EVENTS + EVENTS.index(event)])

    def count_grammar(self, compile_s: Sequence[float]) -> None:
        """Count a request with a grammar.

        Args:
            compile_s: seconds that each core compiled it, negative for those that had it.
        """
        new = [seconds for seconds in compile_s if seconds >= 0]
        self._cells[_GRAMMARS] += 1
        self._cells[_GRAMMARS + 1] += not new
        for seconds in new:
            self.grammar_compilations.observe(seconds)

    def grammars(self, name: str) -> int:
        """One of GRAMMAR_COUNTERS."""
        return int(self._cells[_GRAMMARS + GRAMMAR_COUNTERS.index(name)])

    @classmethod
    def sum_front_ends(cls, every: Sequence["FrontEndStats"]) -> "FrontEndStats":
        """A copy: sums over the front ends, and the latest stats of the core.

        Every front end gets the stats of all steps, so the histogram of step tokens is taken from the first one only.
        """
        total = cls()
        for one in every:
            for index in range(_LIVE, _STEP_TOKENS):
                total._cells[index] += one._cells[index]
        for index in range(_STEP_TOKENS, BLOCK_CELLS):
            total._cells[index] = every[0]._cells[index]
        # A front end that does not know a new core yet has the stats of its predecessor.
        newest = max(every, key=lambda one: (one._cells[_GENERATION], one._cells[_AT]))
        for index in range(_ENDED.start):
            total._cells[index] = newest._cells[index]
        ended = [one._ended_counters(newest._cells[_GENERATION]) for one in every]
        for index, values in enumerate(zip(*ended, strict=True), _ENDED.start):
            total._cells[index] = max(values)  # they may have read different last messages of a core
        return total

    @classmethod
    def sum_replicas(cls, every: Sequence["FrontEndStats"], dead: Sequence[bool]) -> "FrontEndStats":
        """A copy: sums over replicas. A dead one has no running requests and no KV cache, but keeps its counters."""
        total = cls()
        for one in every:
            for index in range(_LIVE, BLOCK_CELLS):
                total._cells[index] += one._cells[index]
        cores = [one.all_cores for one in every]
        living = [core for core, is_dead in zip(cores, dead, strict=True) if not is_dead]
        added = {name: sum(getattr(core, name) for core in cores) for name in _COUNTERS}
        added |= {name: sum(getattr(core, name) for core in living) for name in ("running", "waiting", "step_tokens")}
        summed = Stats(
            kv_cache_usage=sum(core.kv_cache_usage for core in living) / max(1, len(living)),
            last_step_at=max(core.last_step_at for core in cores),
            **added,
        )
        total._write_core(summed)
        for index, name in enumerate(_PART_NAMES, _CORE_MM.start):
            counted = [not gone or name not in _PART_GAUGES for gone in dead]
            ended = index - _CORE.start + _ENDED.start
            total._cells[index] = sum(
                one._cells[index] + one._cells[ended] for one, counts in zip(every, counted, strict=True) if counts
            )
        return total


def _stats(numbers: Sequence[float]) -> Stats:
    """The stats from numbers, those of multimodal inputs and of --kv-spill last."""
    ends = len(_CORE_KINDS), len(_CORE_KINDS) + len(_MM_KINDS)
    core, mm, spill = numbers[: ends[0]], numbers[ends[0] : ends[1]], numbers[ends[1] :]
    fields = [kind(value) for kind, value in zip(_CORE_KINDS, core, strict=True)]
    fields.append(MMStats(*(kind(value) for kind, value in zip(_MM_KINDS, mm, strict=True))) if any(mm) else None)
    fields.append(SpillStats(*map(int, spill)) if any(spill) else None)
    return Stats(*fields)


def shared_cells(size: int, descriptor: int | None) -> tuple[int, memoryview]:
    """Memory that processes share, zero at first, with its descriptor; None makes it."""
    if descriptor is None:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, size)
    return descriptor, memoryview(mmap.mmap(descriptor, size))


class Board:
    """The stats of all front ends of one core."""

    def __init__(self, front_ends: int, shared: memoryview | None = None):
        """`shared` is memory that processes share; None makes memory of this process."""
        cells = memoryview(bytearray(front_ends * BLOCK_BYTES)) if shared is None else shared
        self.stats = tuple(
            FrontEndStats(cells[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES].cast("d"))
            for number in range(front_ends)
        )

    def take_over(self, front_end: int) -> None:
        """The process of a front end is replaced: its successor begins with what the first front end knows."""
        self.stats[front_end].begin_as(self.stats[0])

    def total(self) -> FrontEndStats:
        """Sums over all front ends, now."""
        return FrontEndStats.sum_front_ends(self.stats)


class Boards:
    """The boards of all replicas that a server may have, in memory that its processes share."""

    def __init__(self, front_ends: int, descriptor: int | None = None):
        """`descriptor` is that of boards made by another process; None makes them."""
        self.front_ends = front_ends
        self._size = front_ends * BLOCK_BYTES
        self.descriptor, self._shared = shared_cells(MOST_REPLICAS * self._size, descriptor)
        self._boards: dict[int, Board] = {}  # made on demand: each reads its memory

    def __getitem__(self, replica: int) -> Board:
        if replica not in self._boards:
            begin = replica * self._size
            self._boards[replica] = Board(self.front_ends, self._shared[begin : begin + self._size])
        return self._boards[replica]

    def close(self) -> None:
        """Close the descriptor; the memory remains mapped while it is used."""
        os.close(self.descriptor)
