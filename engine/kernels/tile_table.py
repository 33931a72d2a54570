"""Tiles of the attention kernels as data: what a table has, and which tiles are allowed. Needs no Triton.

target: sm_90
tiles:
  - {numbers: 16-bit, head_dim: 128, launch: decode, lines: 16, keys: 64, warps: 4, stages: 3, programs: 3}
  - {numbers: 16-bit, head_dim: 128, launch: prefill, lines: 128, keys: 64, warps: 8, stages: 3, programs: 1}
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, cast

Numbers = Literal["16-bit", "float32", "8-bit cache"]  # queries and cache; the last: queries of 16 bits
Launch = Literal["decode", "prefill"]

NUMBERS: tuple[Numbers, ...] = ("16-bit", "float32", "8-bit cache")
LAUNCHES: tuple[Launch, ...] = ("decode", "prefill")
HEAD_DIMS = (16, 32, 64, 128, 256)  # of heads, padded
# Shared memory that a program can have, KiB: CUDA C++ Programming Guide, compute capabilities; AMD CDNA 3 ISA.
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
BYTES = {"16-bit": 2, "float32": 4, "8-bit cache": 1}  # of a number of the cache
MIN_LINES = 16  # the least that a product takes
# The largest allowed values. Parts of split keys are multiples of `keys`; partial results grow with `programs`.
LARGEST = {"lines": 256, "keys": 256, "warps": 16, "stages": 8, "programs": 8}
_POWERS = ("lines", "keys", "warps")


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

    def __str__(self) -> str:
        return f"{self.lines}×{self.keys}, {self.warps} warps, {self.stages} stages, {self.programs} programs"


Key = tuple[Numbers, int, Launch]  # the int: padded head dim


@dataclass(frozen=True, slots=True)
class TileTable:
    """Tiles that replace those that come with the kernels.

    target: the architecture for which they were measured, such as sm_90.
    """

    target: str
    tiles: Mapping[Key, Tile] = field(default_factory=dict)

    def merge(self, other: "TileTable") -> "TileTable":
        """This table with the tiles of another one of the same target, which replace its own."""
        return TileTable(self.target, {**self.tiles, **other.tiles})

    def plain(self) -> dict[str, Any]:
        """As `parse_table` reads it."""
        rows = [
            {"numbers": numbers, "head_dim": dim, "launch": launch} | asdict(tile)
            for (numbers, dim, launch), tile in sorted(self.tiles.items())
        ]
        return {"target": self.target, "tiles": rows}


def target_of(capability: tuple[int, int], targets: Iterable[str] = SHARED_KIB) -> str:
    """The target for a compute capability of NVIDIA: the newest that is not newer.

    Raises:
        ValueError: the capability is below 8.0.
    """
    numbered = [(int(name.removeprefix("sm_")), name) for name in targets if name.startswith("sm_")]
    fitting = [target for target in numbered if target[0] <= 10 * capability[0] + capability[1]]
    if not fitting:
        raise ValueError(f"compute capability {capability[0]}.{capability[1]} is below 8.0")
    return max(fitting)[1]


def parse_table(data: Any) -> TileTable:
    """The table that plain data describes.

    Raises:
        ValueError: naming the field that is wrong.
    """
    if not isinstance(data, dict) or not isinstance(data.get("target"), str) or not isinstance(data.get("tiles"), list):
        raise ValueError("target and tiles are needed: the name of an architecture and a list")
    unknown = data.keys() - {"target", "tiles", "gpu", "shape", "made"}
    if unknown:
        raise ValueError(f"{min(map(str, unknown))}: unknown field")
    tiles: dict[Key, Tile] = {}
    for number, row in enumerate(data["tiles"]):
        try:
            key, tile = _parse_row(row)
            check_tile(tile, key, data["target"])
            if key in tiles:
                raise ValueError(f"launch: a {key[2]} tile for {key[0]} and head_dim {key[1]} is there already")
        except ValueError as error:
            raise ValueError(f"tiles[{number}].{error}") from None
        tiles[key] = tile
    return TileTable(data["target"], tiles)


def check_tile(tile: Tile, key: Key, target: str) -> None:
    """Check what is known without compiling.

    Raises:
        ValueError: beginning with the field that is wrong.
    """
    numbers, dim, launch = key
    for name, largest in LARGEST.items():
        value = getattr(tile, name)
        least = MIN_LINES if name in ("lines", "keys") else 1
        if not least <= value <= largest:
            raise ValueError(f"{name} must be from {least} to {largest}, not {value}")
        if name in _POWERS and value & (value - 1):
            raise ValueError(f"{name} must be a power of two, not {value}")
    if launch == "decode" and tile.lines != MIN_LINES:
        raise ValueError(f"lines of a decode tile must be {MIN_LINES}, not {tile.lines}")
    # What stages add depends on the compiler; each product takes its keys or values from shared memory.
    limit, needed = SHARED_KIB.get(target), tile.keys * dim * BYTES[numbers]
    if limit is not None and needed > limit << 10:
        raise ValueError(f"keys must be lower: {tile.keys} take {needed >> 10} KiB of {limit} KiB of shared memory")


def _parse_row(row: Any) -> tuple[Key, Tile]:
    names = [one.name for one in fields(Tile)]
    if not isinstance(row, dict):
        raise ValueError(f"numbers: the entry must have fields such as numbers, head_dim and {names[0]}, not {row!r}")
    for name in row:
        if name not in (*names, "numbers", "head_dim", "launch"):
            raise ValueError(f"{name}: unknown field")
    for name, allowed in (("numbers", NUMBERS), ("head_dim", HEAD_DIMS), ("launch", LAUNCHES)):
        if row.get(name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, not {row.get(name)!r}")
    for name in names:
        if isinstance(row.get(name), bool) or not isinstance(row.get(name), int):
            raise ValueError(f"{name} must be an integer, not {row.get(name)!r}")
    key = (cast("Numbers", row["numbers"]), int(row["head_dim"]), cast("Launch", row["launch"]))
    return key, Tile(**{name: row[name] for name in names})
