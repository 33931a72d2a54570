"""Tilings for every target and shape."""

from types import SimpleNamespace

import pytest

from engine.kernels.tile_table import SHARED_KIB, Tile, TileTable, check_tile
from engine.kernels.triton import launch
from engine.kernels.triton.attention import AttentionShape
from engine.kernels.triton.tiles import EIGHT_BITS, FLOAT32, INTERPRETER, TILES, tilings
from engine.kernels.work_list import capacity


@pytest.mark.parametrize("target", list(TILES))
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (32, 32), (28, 4), (71, 1), (128, 8), (8, 2)])
def test_tiles_fit_together(target: str, itemsize: int, head_dim: int, heads: int, kv_heads: int) -> None:
    shape = AttentionShape(heads, kv_heads, head_dim, 32)
    made = tilings(shape, itemsize, target, 132)
    for tiling in (made.decode, made.prefill):
        together = tiling.programs * kv_heads
        assert target == INTERPRETER or 132 - kv_heads < together  # all multiprocessors have one
        assert together <= max(4 * 132, kv_heads)
        assert tiling.queries * shape.padded_group >= 16
    places = capacity(made, 256, 2048).places
    assert places * kv_heads * shape.place_lines * shape.padded_dim * 4 < 512 << 20


def test_tiles_of_llama_on_hopper() -> None:
    made = tilings(AttentionShape(32, 8, 128, 32), 2, "sm_90", 132)
    assert (made.decode.queries, made.decode.keys, made.decode.programs) == (4, 64, 49)
    assert (made.prefill.queries, made.prefill.keys, made.prefill.programs) == (32, 64, 16)


def test_no_program_waits_for_others_to_end() -> None:
    shape = AttentionShape(32, 8, 128, 32)
    tiles = TILES["sm_90"][128]
    made = tilings(shape, 2, "sm_90", 132)
    for tiling, tile in zip((made.decode, made.prefill), tiles, strict=True):
        assert tiling.programs * shape.kv_heads <= 132 * tile.programs


def test_a_cache_in_8_bits_leaves_room_for_fewer_programs() -> None:
    made = tilings(AttentionShape(32, 8, 128, 32), 2, "sm_90", 132, quantized=True)
    assert made.decode.programs == 33


def test_where_the_conversion_of_8_bits_spills_tiles_are_smaller() -> None:
    shape = AttentionShape(32, 8, 128, 32)
    assert tilings(shape, 2, "sm_80", 108, quantized=True).prefill.keys == 32
    assert tilings(shape, 2, "sm_80", 108).prefill.keys == 64
    assert tilings(shape, 4, "sm_80", 108, quantized=True) == tilings(shape, 4, "sm_80", 108)


def test_the_interpreter_has_one_program_for_each_head() -> None:
    made = tilings(AttentionShape(4, 2, 8, 32), 4, INTERPRETER, 1)
    assert (made.decode.programs, made.prefill.programs) == (1, 1)


def test_what_no_tile_serves_is_refused() -> None:
    with pytest.raises(ValueError, match="heads of 512 dims are above 256"):
        tilings(AttentionShape(8, 1, 512, 32), 2, "sm_90", 132)


def test_the_tiles_that_come_with_the_kernels_are_allowed_in_tables() -> None:
    checked = 0
    for target, table in TILES.items():
        if target != INTERPRETER:
            parts = (("16-bit", table), ("float32", FLOAT32), ("8-bit cache", EIGHT_BITS.get(target, {})))
            for numbers, tiles in parts:
                for dim, pair in tiles.items():
                    for kind, tile in zip(("decode", "prefill"), pair, strict=True):
                        check_tile(tile, (numbers, dim, kind), target)
                        checked += 1
    assert checked == len(SHARED_KIB) * 12 + 2 * sum(len(tiles) for tiles in EIGHT_BITS.values())


def test_measured_tiles_replace_those_of_the_same_head_dim_only() -> None:
    decode, prefill = Tile(16, 128, 8, 2, 2), Tile(64, 128, 4, 2, 2)
    keys = (("16-bit", 128, "decode"), ("16-bit", 64, "prefill"), ("8-bit cache", 128, "decode"))
    table = TileTable("sm_90", dict(zip(keys, (decode, prefill, decode), strict=True)))
    shape, small = AttentionShape(32, 8, 128, 32), AttentionShape(32, 8, 64, 32)
    made = tilings(shape, 2, "sm_90", 132, table=table)
    assert (made.decode.keys, made.decode.warps, made.decode.stages, made.decode.programs) == (128, 8, 2, 33)
    assert made.prefill == tilings(shape, 2, "sm_90", 132).prefill
    assert tilings(small, 2, "sm_90", 132, table=table).prefill.queries == 16
    assert tilings(small, 2, "sm_90", 132, table=table).decode == tilings(small, 2, "sm_90", 132).decode
    assert tilings(shape, 2, "sm_90", 132, True, table).decode.keys == 128
    assert tilings(shape, 4, "sm_90", 132, table=table) == tilings(shape, 4, "sm_90", 132)


class StandInDriver:
    """Triton's driver of a GPU, as far as it is asked."""

    def __init__(self, arch: int | str):
        self._arch = arch
        self.utils = self

    def get_current_target(self) -> SimpleNamespace:
        return SimpleNamespace(backend="cuda", arch=self._arch, warp_size=32)

    def get_current_device(self) -> int:
        return 1

    def get_device_properties(self, device: int) -> dict[str, int]:
        assert device == 1
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}


@pytest.mark.parametrize(
    ("arch", "target"), [(90, "sm_90"), (89, "sm_80"), (103, "sm_100"), (121, "sm_120"), ("gfx942:sramecc+", "gfx942")]
)
def test_target_of_the_current_gpu(arch: int | str, target: str) -> None:
    assert launch.current_gpu(StandInDriver(arch)) == launch.Gpu(target, 132)
    with pytest.raises(ValueError, match=r"compute capability 7\.5 is below 8\.0"):
        launch.current_gpu(StandInDriver(75))


def test_other_gpus_by_amd_get_the_tiles_of_one() -> None:
    shape = AttentionShape(32, 8, 128, 32)
    assert tilings(shape, 2, "gfx90a", 104) == tilings(shape, 2, "gfx942", 104)
