"""Tilings for every target and shape."""

import pytest

from engine.kernels.triton.attention import AttentionShape
from engine.kernels.triton.tiles import INTERPRETER, TILES, target_of, tilings
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


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 3), "sm_100"), ((12, 1), "sm_120")],
)
def test_target_of_a_capability(capability: tuple[int, int], target: str) -> None:
    assert target_of(capability) == target


def test_what_no_tile_serves_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compute capability 7\.5 is below 8\.0"):
        target_of((7, 5))
    with pytest.raises(ValueError, match="heads of 512 dims are above 256"):
        tilings(AttentionShape(8, 1, 512, 32), 2, "sm_90", 132)
