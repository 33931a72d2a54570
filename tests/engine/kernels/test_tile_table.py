"""Tables of tiles: what is read, and which tiles are refused."""

from typing import Any

import pytest

from engine.kernels.tile_table import Tile, TileTable, parse_table, target_of

ROW: dict[str, Any] = {
    "numbers": "16-bit", "head_dim": 128, "launch": "decode", "lines": 16, "keys": 64, "warps": 4, "stages": 3,
    "programs": 3,
}  # fmt: skip


def table_of(*rows: Any, target: str = "sm_90") -> dict[str, Any]:
    return {"target": target, "tiles": list(rows)}


def test_a_table_is_read_as_it_was_written() -> None:
    prefill = ROW | {"launch": "prefill", "lines": 128, "warps": 8, "programs": 1}
    table = parse_table(table_of(ROW, prefill) | {"gpu": "NVIDIA H100", "made": "2026-01-01", "shape": "32/8/128"})
    assert table.target == "sm_90"
    assert table.tiles["16-bit", 128, "decode"] == Tile(16, 64, 4, 3, 3)
    assert table.tiles["16-bit", 128, "prefill"] == Tile(128, 64, 8, 3, 1)
    assert parse_table(table.plain()) == table
    assert parse_table(table_of()) == TileTable("sm_90")


def test_tiles_of_another_table_replace_those_of_the_same_key() -> None:
    old = parse_table(table_of(ROW, ROW | {"head_dim": 64}))
    merged = old.merge(parse_table(table_of(ROW | {"keys": 128})))
    assert merged.tiles["16-bit", 128, "decode"].keys == 128
    assert merged.tiles["16-bit", 64, "decode"].keys == 64


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"numbers": "bf16"}, "numbers must be one of 16-bit, float32, 8-bit cache, not 'bf16'"),
        ({"head_dim": 80}, "head_dim must be one of 16, 32, 64, 128, 256, not 80"),
        ({"launch": None}, "launch must be one of decode, prefill, not None"),
        ({"keys": "64"}, "keys must be an integer, not '64'"),
        ({"stages": True}, "stages must be an integer, not True"),
        ({"keys": 48}, "keys must be a power of two, not 48"),
        ({"warps": 3}, "warps must be a power of two, not 3"),
        ({"keys": 8}, "keys must be from 16 to 256, not 8"),
        ({"programs": 0}, "programs must be from 1 to 8, not 0"),
        ({"warps": 32}, "warps must be from 1 to 16, not 32"),
        ({"lines": 32}, "lines of a decode tile must be 16, not 32"),
        ({"launch": "prefill", "lines": 96}, "lines must be a power of two, not 96"),
        (
            {"numbers": "float32", "head_dim": 256, "keys": 256},
            "keys must be lower: 256 take 256 KiB of 227 KiB of shared memory",
        ),
        ({"tiles": 3}, "tiles: unknown field"),
    ],
)
def test_what_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^tiles\[1\]\.") as error:
        parse_table(table_of(ROW | {"head_dim": 64}, ROW | changed))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "target and tiles are needed"),
        ({"target": "sm_90"}, "target and tiles are needed"),
        ({"target": 90, "tiles": []}, "target and tiles are needed"),
        (table_of() | {"gpus": 1}, "gpus: unknown field"),
        (table_of(ROW, ROW), r"tiles[1].launch: a decode tile for 16-bit and head_dim 128 is there already"),
        (table_of(3), "tiles[0].numbers: the entry must have fields such as numbers, head_dim and lines, not 3"),
    ],
)
def test_what_is_no_table(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        parse_table(data)
    assert message in str(error.value)


def test_shared_memory_of_other_targets_is_not_known() -> None:
    big = ROW | {"numbers": "float32", "head_dim": 256, "keys": 256}
    assert parse_table(table_of(big, target="gfx1100")).tiles["float32", 256, "decode"].keys == 256


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 3), "sm_100"), ((12, 1), "sm_120")],
)
def test_target_of_a_capability(capability: tuple[int, int], target: str) -> None:
    assert target_of(capability) == target


def test_capabilities_without_tiles() -> None:
    with pytest.raises(ValueError, match=r"compute capability 7\.5 is below 8\.0"):
        target_of((7, 5))
