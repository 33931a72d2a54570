"""Times of images follow from their patches and the shape of the tower."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.errors import ConfigError
from engine.hardware.description import read_hardware
from engine.hardware.step_time import DecoderShape, StepTime, StepWork
from engine.hardware.towers import TowerShape, TowerTime, molmo_tokens, tower_shape
from tests.engine.hardware.model_configs import CONFIGS, LLAVA

H100 = read_hardware("h100")
QWEN = DecoderShape(28, 3584, 18944, 28, 4, 128, 152064)


def shape_of(config: dict[str, Any]) -> TowerShape:
    shape = tower_shape(config)
    assert shape is not None
    return shape


def test_towers_are_read_from_configs() -> None:
    qwen, pixtral, molmo = (shape_of(CONFIGS[name]) for name in ("qwen2-vl-7b", "pixtral-12b", "molmo-72b"))
    assert (qwen.layers, qwen.hidden_size, qwen.intermediate_size, qwen.merged) == (32, 1280, 5120, 4)
    assert (pixtral.layers, pixtral.hidden_size, pixtral.intermediate_size, pixtral.gated) == (24, 1024, 4096, True)
    assert (molmo.layers, molmo.crop, molmo.connector[-1]) == (23, 577, (29568, 8192))
    llava = shape_of(LLAVA)
    assert (llava.layers, llava.crop, llava.connector) == (23, 577, ((1024, 4096), (4096, 4096)))
    assert tower_shape(CONFIGS["llama-3.1-8b"]) is None


def test_a_tower_without_times_is_refused_with_those_that_have_some() -> None:
    with pytest.raises(ConfigError, match=r"no times for the inputs of gemma3: it knows .* Pixtral, Qwen2-VL"):
        tower_shape({"model_type": "gemma3", "vision_config": {"model_type": "siglip_vision_model"}})
    without = replace(H100, attention=replace(H100.attention, tower=None))
    with pytest.raises(ConfigError, match=r"H100 .* lacks attention.tower"):
        TowerTime(without, shape_of(LLAVA))


def test_patches_follow_from_the_tokens_of_a_image() -> None:
    assert shape_of(CONFIGS["qwen2-vl-7b"]).sequences(300) == (1, 1200)
    assert shape_of(CONFIGS["pixtral-12b"]).sequences(64 * 65) == (1, 64 * 64)
    assert shape_of(LLAVA).sequences(576) == (1, 577)
    assert shape_of(CONFIGS["molmo-72b"]).sequences(molmo_tokens(3, 4)) == (13, 577)


@given(rows=st.integers(1, 12), columns=st.integers(1, 12))
def test_the_tokens_of_a_image_of_molmo_say_how_it_is_cut(rows: int, columns: int) -> None:
    if rows * columns <= 12:
        count, _ = shape_of(CONFIGS["molmo-72b"]).sequences(molmo_tokens(rows, columns))
        assert abs(count - (1 + rows * columns)) <= 2  # 10 x 1 crops have as many tokens as 3 x 4


@given(name=st.sampled_from(["qwen2-vl-7b", "pixtral-12b"]), tokens=st.integers(1, 5000), more=st.integers(1, 5000))
def test_larger_images_never_take_less_time(name: str, tokens: int, more: int) -> None:
    tower = TowerTime(H100, shape_of(CONFIGS[name]))
    assert tower.seconds(tokens + more) >= tower.seconds(tokens) > 0


def test_a_image_takes_at_least_the_time_of_its_operations() -> None:
    shape = shape_of(CONFIGS["qwen2-vl-7b"])
    patches = 4 * 1280
    layer = 2 * patches * (4 * 1280**2 + 2 * 1280 * 5120) + 4 * patches**2 * 1280
    least = 32 * layer / 989e12
    assert least < TowerTime(H100, shape).seconds(1280) < 4 * least


def test_images_add_to_a_step() -> None:
    step_time = StepTime(H100, QWEN, tower=shape_of(CONFIGS["qwen2-vl-7b"]))
    text = StepWork(chunks=[(700, 0)], sampled=1)
    both = StepWork(chunks=[(700, 0)], sampled=1, images=[300, 350])
    tower = TowerTime(H100, shape_of(CONFIGS["qwen2-vl-7b"]))
    added = tower.seconds(300) + tower.seconds(350)
    assert step_time.seconds(both) == pytest.approx(step_time.seconds(text) + added)
