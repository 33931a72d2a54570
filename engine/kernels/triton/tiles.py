"""Tiles of the attention kernels by target: data, and the tilings that follow from it for a layer's shape.

`make aot` compiles them ahead of time and fails if one spills registers or exceeds shared memory. With Triton 3.7.1
this was done in bfloat16 for all, but not yet for float16, float32 and many variants of attention, see
docs/benchmarks/cuda.md. The tiles are not tuned by measurement on the targets, and larger ones may fit.
"""

from dataclasses import dataclass

from engine.kernels.triton.attention import AttentionShape
from engine.kernels.work_list import Tiling, Tilings

INTERPRETER = "interpreter"
MIN_PART = 256  # keys of a part when decoding: its result has 1 to 2 % of the bytes of its keys and values
MIN_PREFILL_PART = 1024  # a part's result costs a quarter of the time of as many keys


@dataclass(frozen=True, slots=True)
class Tile:
    """Shape and launch options of a program.

    lines: queries * heads of a group (in a decode tile as many as a product needs); keys: at a time; programs: that a
    multiprocessor runs at a time, by registers and shared memory.
    """

    lines: int
    keys: int
    warps: int
    stages: int
    programs: int


# By target and padded head dim: decode tile, prefill tile. For float16 and bfloat16.
_HOPPER = {
    64: (Tile(16, 64, 4, 3, 4), Tile(128, 64, 4, 3, 2)),
    128: (Tile(16, 64, 4, 3, 3), Tile(128, 64, 8, 3, 1)),
    256: (Tile(16, 32, 8, 3, 2), Tile(64, 32, 8, 2, 1)),
}
TILES: dict[str, dict[int, tuple[Tile, Tile]]] = {
    "sm_80": _HOPPER | {64: (Tile(16, 64, 4, 3, 4), Tile(128, 64, 8, 3, 1))},
    "sm_90": _HOPPER,
    "sm_100": _HOPPER
    | {
        64: (Tile(16, 64, 4, 3, 4), Tile(128, 64, 8, 3, 1)),
        128: (Tile(16, 64, 4, 3, 3), Tile(128, 32, 8, 3, 1)),
        256: (Tile(16, 32, 8, 3, 1), Tile(64, 32, 8, 2, 1)),
    },
    "sm_120": {
        64: (Tile(16, 64, 4, 3, 4), Tile(128, 64, 8, 3, 1)),
        128: (Tile(16, 64, 4, 2, 2), Tile(128, 32, 8, 2, 1)),
        256: (Tile(16, 32, 8, 2, 2), Tile(64, 32, 8, 2, 1)),
    },
    "gfx942": {
        64: (Tile(16, 64, 4, 2, 3), Tile(128, 64, 8, 2, 1)),
        128: (Tile(16, 64, 4, 2, 2), Tile(128, 32, 8, 2, 1)),
        256: (Tile(16, 32, 8, 2, 1), Tile(32, 32, 4, 2, 1)),
    },
    INTERPRETER: {dim: (Tile(16, 64, 1, 1, 1), Tile(64, 64, 1, 1, 1)) for dim in (64, 128, 256)},
}
# For float32, on all targets: products without TF32 run on the cores for scalars, so these only have to fit.
FLOAT32 = {
    64: (Tile(16, 32, 4, 2, 2), Tile(32, 32, 8, 2, 1)),
    128: (Tile(16, 32, 8, 2, 1), Tile(32, 32, 8, 2, 1)),
    256: (Tile(16, 16, 4, 2, 1), Tile(32, 16, 8, 2, 1)),
}

# For caches in 8 bits, whose conversion takes registers, in place of the tiles above.
EIGHT_BITS = {
    "sm_80": {128: (Tile(16, 64, 4, 3, 2), Tile(128, 32, 8, 2, 1))},
    "sm_120": {128: (Tile(16, 64, 4, 2, 2), Tile(64, 32, 8, 2, 1))},
    "gfx942": {128: (Tile(16, 64, 4, 2, 1), Tile(128, 32, 8, 2, 1))},
}


def target_of(capability: tuple[int, int]) -> str:
    """The target in the tables for a compute capability of NVIDIA: the newest that is not newer.

    Raises:
        ValueError: the capability is below 8.0.
    """
    targets = [(int(name.removeprefix("sm_")), name) for name in TILES if name.startswith("sm_")]
    fitting = [target for target in targets if target[0] <= 10 * capability[0] + capability[1]]
    if not fitting:
        raise ValueError(f"compute capability {capability[0]}.{capability[1]} is below 8.0")
    return max(fitting)[1]


def tilings(
    shape: AttentionShape, itemsize: int, target: str, multiprocessors: int, quantized: bool = False
) -> Tilings:
    """The tilings for a layer's shape.

    Args:
        itemsize: bytes of a number of queries, 2 or 4.
        target: a key of TILES.
        multiprocessors: of the device; 1 in the interpreter.
        quantized: the cache has 8 bits, whose conversion takes registers.

    Raises:
        ValueError: the head dim is above 256.
    """
    if itemsize == 4 and target != INTERPRETER:
        table = FLOAT32
    else:
        table = TILES[target] | (EIGHT_BITS.get(target, {}) if quantized else {})
    fitting = [dim for dim in sorted(table) if dim >= shape.padded_dim]
    if not fitting:
        raise ValueError(f"heads of {shape.head_dim} dims are above {max(table)}")
    decode, prefill = table[fitting[0]]
    if shape.place_lines > 2 * decode.lines:  # so many heads share a KV head that one token fills a large tile
        decode = prefill
    programs = min(decode.programs, 2) if quantized else decode.programs
    queries = max(prefill.lines // shape.padded_group, shape.decode_queries)
    return Tilings(
        _tiling(shape, decode, shape.decode_queries, programs * multiprocessors, MIN_PART),
        _tiling(shape, prefill, queries, prefill.programs * multiprocessors, MIN_PREFILL_PART),
    )


def _tiling(shape: AttentionShape, tile: Tile, queries: int, programs: int, min_part: int) -> Tiling:
    # Rounded down: programs that don't fit at the same time as the others would start when those end.
    per_head = max(programs // shape.kv_heads, 1)
    return Tiling(queries, tile.keys, per_head, min_part, tile.warps, tile.stages)
