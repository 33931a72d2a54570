"""Tiles of the attention kernels by target, and the tilings that follow from them for a layer's shape.

`make aot` compiles them ahead of time and fails if one spills registers or exceeds shared memory, see
docs/benchmarks/cuda.md. The tiles are not tuned by measurement on the targets, and larger ones may fit: `redline
profile --tune` measures them on a GPU and writes a table in the form of `engine.kernels.tile_table`.
"""

from dataclasses import replace

from engine.kernels.tile_table import Numbers, Tile, TileTable
from engine.kernels.triton.attention import AttentionShape
from engine.kernels.triton.launch import Gpu
from engine.kernels.work_list import Tiling, Tilings

INTERPRETER = "interpreter"
INTERPRETED_GPU = Gpu(INTERPRETER, 1)
OTHER_AMD = "gfx942"
MIN_PART = 256  # keys of a part when decoding: its result has 1 to 2 % of the bytes of its keys and values
MIN_PREFILL_PART = 1024  # a part's result costs a quarter of the time of as many keys

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
    "sm_80": {
        128: (Tile(16, 64, 4, 3, 2), Tile(128, 32, 8, 2, 1)),
        256: (Tile(16, 32, 8, 3, 1), Tile(64, 32, 8, 2, 1)),
    },
    "sm_90": {
        64: (Tile(16, 64, 4, 3, 4), Tile(128, 64, 8, 3, 1)),
        256: (Tile(16, 32, 8, 3, 1), Tile(64, 16, 8, 2, 1)),
    },
    "sm_120": {
        128: (Tile(16, 64, 4, 2, 2), Tile(64, 32, 8, 2, 1)),
        256: (Tile(16, 32, 4, 2, 2), Tile(64, 32, 8, 2, 1)),
    },
    "gfx942": {
        64: (Tile(16, 64, 4, 2, 3), Tile(64, 32, 4, 2, 1)),
        128: (Tile(16, 64, 4, 2, 1), Tile(128, 16, 8, 2, 1)),
        256: (Tile(16, 32, 4, 2, 1), Tile(32, 32, 4, 2, 1)),
    },
}


def tilings(
    shape: AttentionShape,
    itemsize: int,
    target: str,
    multiprocessors: int,
    quantized: bool = False,
    table: TileTable | None = None,
) -> Tilings:
    """The tilings for a layer's shape.

    Args:
        itemsize: bytes of a number of queries, 2 or 4.
        target: a key of TILES; other GPUs by AMD get the tiles of gfx942.
        multiprocessors: of the device.
        quantized: the cache has 8 bits, whose conversion takes registers.
        table: measured tiles, which replace those of this module where they are for the shape's padded head dim.

    Raises:
        ValueError: the head dim is above 256.
    """
    numbers = numbers_of(itemsize, quantized)
    decode, prefill = builtin_tiles(shape, numbers, target)
    if table is not None:
        decode = table.tiles.get((numbers, shape.padded_dim, "decode"), decode)
        prefill = table.tiles.get((numbers, shape.padded_dim, "prefill"), prefill)
    return tilings_of(shape, decode, prefill, multiprocessors)


def numbers_of(itemsize: int, quantized: bool) -> Numbers:
    """The tiles of a table that serve queries of this itemsize, and a cache that has 8 bits or not."""
    if itemsize == 4:
        return "float32"
    return "8-bit cache" if quantized else "16-bit"


def builtin_tiles(shape: AttentionShape, numbers: Numbers, target: str) -> tuple[Tile, Tile]:
    """The decode tile and the prefill tile of this module.

    Raises:
        ValueError: the head dim is above 256.
    """
    if numbers == "float32" and target != INTERPRETER:
        table = FLOAT32
    else:
        known = target if target in TILES else OTHER_AMD
        table = TILES[known] | (EIGHT_BITS.get(known, {}) if numbers == "8-bit cache" else {})
    fitting = [dim for dim in sorted(table) if dim >= shape.padded_dim]
    if not fitting:
        raise ValueError(f"heads of {shape.head_dim} dims are above {max(table)}")
    decode, prefill = table[fitting[0]]
    if numbers == "8-bit cache":
        decode = replace(decode, programs=min(decode.programs, 2))
    return decode, prefill


def tilings_of(shape: AttentionShape, decode: Tile, prefill: Tile, multiprocessors: int) -> Tilings:
    """The tilings of a shape with these tiles."""
    if shape.place_lines > 2 * decode.lines:  # so many heads share a KV head that one token fills a large tile
        decode = prefill
    queries = max(prefill.lines // shape.padded_group, shape.decode_queries)
    return Tilings(
        _tiling(shape, decode, shape.decode_queries, decode.programs * multiprocessors, MIN_PART),
        _tiling(shape, prefill, queries, prefill.programs * multiprocessors, MIN_PREFILL_PART),
    )


def _tiling(shape: AttentionShape, tile: Tile, queries: int, programs: int, min_part: int) -> Tiling:
    # Rounded down: programs that don't fit at the same time as the others would start when those end.
    per_head = max(programs // shape.kv_heads, 1)
    return Tiling(queries, tile.keys, per_head, min_part, tile.warps, tile.stages)
