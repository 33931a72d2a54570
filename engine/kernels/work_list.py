"""Work lists of paged attention: which queries and keys each item of a kernel launch covers. numpy only.

The kernels have a fixed number of programs, which take items from a list in memory in turn, so one captured graph
serves any batch. Rows with few tokens (decoding, draft tokens) and rows with long chunks have lists of their own,
because their tiles differ. An item is a tile of queries of one batch row against a range of keys, for each KV head:

    batch row | first query of the tile | first key | end of the keys | place | 1: no part is before it

Where rows are few and long, the keys of a tile are split into parts that different programs compute. A part leaves its
result at a `place` of a buffer, and a merge adds up the parts of a tile; a tile of one part has place -1 and writes the
output itself. A place holds `decode.queries` queries. A prefill tile takes several, so both have one list of merges:

    batch row | first query | place of the first part | parts | places from one part to the next
"""

from dataclasses import dataclass

import numpy as np

from engine.arrays import Int32s, Int64s

ITEM_COLUMNS = 6
MERGE_COLUMNS = 5
# A tile is split if it has more keys than its share of two rounds of all programs, into parts of a quarter of a round.
SPLIT_ROUNDS = 2
PART_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a launch divides its work.

    Args:
        queries: tokens of a batch row in a tile.
        keys: tokens of the cache that a program loads at a time.
        programs: programs for each KV head.
        min_part: least keys of a part, a multiple of `keys`.
        warps, stages: launch options of a program.
    """

    queries: int
    keys: int
    programs: int
    min_part: int = 256
    warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        if self.min_part % self.keys:
            raise ValueError(f"parts of at least {self.min_part} keys aren't multiples of {self.keys} keys")


@dataclass(frozen=True, slots=True)
class Tilings:
    """Tilings of rows with at most `decode.queries` tokens, and of rows with more."""

    decode: Tiling
    prefill: Tiling

    def __post_init__(self) -> None:
        if self.prefill.queries % self.decode.queries:
            raise ValueError(
                f"prefill tiles of {self.prefill.queries} queries aren't multiples of decode tiles of "
                f"{self.decode.queries}"
            )

    @property
    def places_per_prefill_tile(self) -> int:
        return self.prefill.queries // self.decode.queries


@dataclass(frozen=True, slots=True)
class Capacity:
    """Most items, merges and places of any batch, for buffers with fixed addresses."""

    decode: int
    prefill: int
    merges: int
    places: int


@dataclass(frozen=True, slots=True)
class WorkList:
    """The work of a step for all layers with the same window.

    decode: int32[n, 6]; prefill: int32[m, 6]; merges: int32[k, 5]; sizes: int32[3], n, m and k, which the kernels read
    because the arrays are longer on the device.
    """

    decode: Int32s
    prefill: Int32s
    merges: Int32s
    sizes: Int32s


def capacity(tilings: Tilings, rows: int, tokens: int) -> Capacity:
    """The capacity for batches of at most `rows` rows and `tokens` tokens.

    Less than SPLIT_ROUNDS * programs tiles exceed the share at which a tile is split, and each has at most one part
    more than its share of the PART_ROUNDS * programs parts that all keys make up.
    """
    per_program = SPLIT_ROUNDS + PART_ROUNDS
    decode, prefill, per_tile = tilings.decode, tilings.prefill, tilings.places_per_prefill_tile
    chunks = min(rows, tokens // (decode.queries + 1))
    return Capacity(
        decode=min(rows, tokens) + per_program * decode.programs,
        prefill=tokens // prefill.queries + chunks + per_program * prefill.programs,
        merges=SPLIT_ROUNDS * (decode.programs + per_tile * prefill.programs),
        places=per_program * (decode.programs + per_tile * prefill.programs),
    )


def plan_work(
    counts: Int64s,
    num_computed: Int64s,
    tilings: Tilings,
    window: int | None = None,
    ends: Int64s | None = None,
) -> WorkList:
    """Plan attention of a ragged batch.

    Args:
        counts: int64[rows], tokens of each row in this step; 0: nothing.
        num_computed: int64[rows], tokens before them.
        tilings: of both launches.
        window: tokens that a query sees, itself included; None: all before it.
        ends: int64[tokens], for each token of the batch the position after the last that it sees, at least its own + 1
            and at most the end of its row. More than that only within bidirectional spans. None: causal.
    """
    starts = np.cumsum(counts) - counts
    few = np.flatnonzero((counts > 0) & (counts <= tilings.decode.queries))
    many = np.flatnonzero(counts > tilings.decode.queries)
    batch = (counts, num_computed, starts)
    decode, decode_merges, places = _plan_launch(few, batch, tilings.decode, window, ends, 1, 0)
    per_tile = tilings.places_per_prefill_tile
    prefill, prefill_merges, _ = _plan_launch(many, batch, tilings.prefill, window, ends, per_tile, places)
    merges = np.concatenate((decode_merges, _divide_merges(prefill_merges, counts, tilings)))
    sizes = np.array([len(decode), len(prefill), len(merges)], dtype=np.int32)
    return WorkList(decode, prefill, merges, sizes)


def _plan_launch(
    rows: Int64s,
    batch: tuple[Int64s, Int64s, Int64s],
    tiling: Tiling,
    window: int | None,
    ends: Int64s | None,
    places_per_tile: int,
    first_place: int,
) -> tuple[Int32s, Int32s, int]:
    """Items and merges (of whole tiles) of one launch, and the first place that it leaves free."""
    if not len(rows):
        return np.zeros((0, ITEM_COLUMNS), np.int32), np.zeros((0, MERGE_COLUMNS), np.int32), first_place
    counts, num_computed, starts = batch
    tiles = -(-counts[rows] // tiling.queries)
    row = np.repeat(rows, tiles)
    first = _ranges(tiles) * tiling.queries
    last = np.minimum(first + tiling.queries, counts[row])
    low = np.zeros_like(first) if window is None else np.maximum(num_computed[row] + first - window + 1, 0)
    high = num_computed[row] + last
    if ends is not None:
        borders = np.stack((starts[row] + first, starts[row] + last), 1).ravel()
        high = np.maximum.reduceat(np.append(ends, 0), borders)[::2]
    parts, length = _split(high - low, tiling)
    tile = np.repeat(np.arange(len(row)), parts)
    part = _ranges(parts)
    items = np.empty((len(tile), ITEM_COLUMNS), dtype=np.int32)
    items[:, 0], items[:, 1] = row[tile], first[tile]
    items[:, 2] = low[tile] + part * length[tile]
    items[:, 3] = np.minimum(items[:, 2] + length[tile], high[tile])
    is_split = parts > 1
    taken = np.where(is_split, parts, 0) * places_per_tile
    place = first_place + np.cumsum(taken) - taken
    items[:, 4] = np.where(is_split[tile], place[tile] + part * places_per_tile, -1)
    items[:, 5] = part == 0
    merges = np.empty((int(is_split.sum()), MERGE_COLUMNS), dtype=np.int32)
    merges[:, 0], merges[:, 1], merges[:, 2] = row[is_split], first[is_split], place[is_split]
    merges[:, 3], merges[:, 4] = parts[is_split], places_per_tile
    return _deal(items, tiling.programs), merges, first_place + int(taken.sum())


def _split(keys: Int64s, tiling: Tiling) -> tuple[Int64s, Int64s]:
    """The number of parts of each tile, and the keys of each of its parts but the last."""
    total = int(keys.sum())
    limit = total // (SPLIT_ROUNDS * tiling.programs)
    share = max(-(-total // (PART_ROUNDS * tiling.programs)), tiling.min_part)
    parts = np.where(keys > limit, np.minimum(-(-keys // share), keys // tiling.min_part), 1)
    length = -(-keys // np.maximum(parts, 1))
    length = -(-length // tiling.keys) * tiling.keys
    return -(-keys // length), length


def _deal(items: Int32s, programs: int) -> Int32s:
    """Sort items so that programs get about the same number of keys: the longest first, every other round reversed.

    The last full round is reversed, so that the programs of the first items, which have one more, have less before it.
    """
    items = items[np.argsort(items[:, 2] - items[:, 3], kind="stable")]
    place = np.arange(len(items))
    rounds, turn = place // programs, place % programs
    full = len(items) // programs
    is_reversed = (rounds < full) & ((full - rounds) % 2 == 1)
    return items[np.where(is_reversed, rounds * programs + programs - 1 - turn, place)]


def _divide_merges(merges: Int32s, counts: Int64s, tilings: Tilings) -> Int32s:
    """Merges of prefill tiles, divided into merges of `decode.queries` queries each."""
    if not len(merges):
        return merges
    queries = tilings.decode.queries
    left = np.minimum(counts[merges[:, 0]] - merges[:, 1], tilings.prefill.queries)
    pieces = -(-left // queries)
    piece = _ranges(pieces)
    divided = np.repeat(merges, pieces, 0)
    divided[:, 1] += (piece * queries).astype(np.int32)
    divided[:, 2] += piece.astype(np.int32)
    return divided


def _ranges(lengths: Int64s) -> Int64s:
    """[0, 1, …, lengths[0] - 1, 0, 1, …]."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)
