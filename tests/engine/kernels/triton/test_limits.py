"""Shapes that the Triton attention refuses are those that no tile serves."""

import pytest

from engine.kernels.triton.attention import AttentionShape
from engine.kernels.triton.limits import MAX_GROUP, MAX_HEAD_DIM, attention_refusal
from engine.kernels.triton.tiles import TILES, tilings


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ((32, 8, 128), None),
        ((71, 1, 64), None),
        ((128, 128, 192), None),  # keys of DeepSeek-V3, and its values padded to them
        ((4, 4, 5), "its heads have 5 elements, an odd number"),
        ((8, 1, 512), "its heads have 512 elements, more than 256"),
        ((256, 1, 64), "256 heads share a KV head, more than 128"),
    ],
)
def test_which_shapes_are_refused(shape: tuple[int, int, int], why: str | None) -> None:
    assert attention_refusal(*shape) == why


@pytest.mark.parametrize("target", list(TILES))
def test_the_largest_shape_has_a_tile(target: str) -> None:
    made = tilings(AttentionShape(MAX_GROUP, 1, MAX_HEAD_DIM, 32), 2, target, 132)
    assert made.decode.queries == 1
    with pytest.raises(ValueError, match="are above"):
        tilings(AttentionShape(MAX_GROUP, 1, MAX_HEAD_DIM + 2, 32), 2, target, 132)
