"""Rotary positions of models with M-RoPE against `get_rope_index` of transformers' classes."""

from typing import Any

import numpy as np
import pytest
import torch

from engine.worker.mrope import GridInput, rotary_positions, runs_of
from tests.engine.multimodal.tiny_vision import tiny_model

IMAGE, VIDEO, TEXT = 256, 257, 5
# Grids of embeddings and seconds per frame; a number is a text of that many tokens.
PROMPTS: list[list[Any]] = [
    [4],
    [3, (1, 2, 3), 2],
    [(1, 5, 2), 1, (1, 1, 1), 4],
    [1, (3, 2, 2, 0.7), 3],
    [2, (2, 2, 4, 1.0), 1, (1, 3, 2), 2, (4, 1, 2, 0.4), 5],
    [2, (6, 1, 1, 9.0), 1],  # its times are above the positions of the text after it
    [3, (1, 2, 3)],
]


def layout(prompt: list[Any], *, framed: bool) -> tuple[list[int], list[GridInput], list[tuple[int, ...]]]:
    """Token ids, inputs, and the grids of patches of images and videos. Framed: text before each frame of a video."""
    ids: list[int] = []
    inputs, grids = [], []
    for part in prompt:
        if isinstance(part, int):
            ids += [TEXT] * part
            continue
        frames, rows, columns, *seconds = part
        token, first = VIDEO if seconds else IMAGE, len(ids)
        for _ in range(frames):
            ids += [TEXT] * (2 * framed if seconds else 0) + [token] * (rows * columns)
        at = np.flatnonzero(np.array(ids[first:]) == token) + first
        inputs.append(GridInput(at, (frames, rows, columns), *seconds))
        grids.append((token, frames, 2 * rows, 2 * columns))
    return ids, inputs, grids


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_as_transformers(model_type: str, prompt: list[Any]) -> None:
    model = tiny_model(model_type)
    ids, inputs, grids = layout(prompt, framed=model_type == "qwen3_vl")
    timed = model_type == "qwen2_5_vl"
    followed = torch.tensor([[*ids, TEXT]])  # with the first generated token
    arguments: dict[str, Any] = {"mm_token_type_ids": (followed == IMAGE).int() + 2 * (followed == VIDEO).int()}
    for name, kind in (("image_grid_thw", IMAGE), ("video_grid_thw", VIDEO)):
        found = [grid for token, *grid in grids if token == kind]
        arguments[name] = torch.tensor(found) if found else None
    if timed:
        arguments["second_per_grid_ts"] = [one.seconds_per_frame for one in inputs if one.seconds_per_frame]
    expected = model.model.get_rope_index(followed, **arguments)[0][:, 0].numpy()

    positions, delta = rotary_positions(len(ids), inputs, 2.0 if timed else None)
    assert np.array_equal(positions, expected[:, :-1])
    assert len(ids) + delta == expected[0, -1] == expected[:, -1].max()


def test_adjacent_images_are_two() -> None:
    """transformers takes them for one."""
    inputs = [GridInput(np.arange(1, 3), (1, 1, 2)), GridInput(np.arange(3, 5), (1, 2, 1))]
    positions, delta = rotary_positions(6, inputs)
    assert positions.tolist() == [[0, 1, 1, 3, 3, 5], [0, 1, 1, 3, 4, 5], [0, 1, 2, 3, 3, 5]]
    assert delta == 0


def test_an_input_with_too_few_tokens_is_a_fault() -> None:
    with pytest.raises(RuntimeError, match="a grid of 1 × 2 × 2 has 3 embeddings"):
        rotary_positions(4, [GridInput(np.arange(3), (1, 2, 2))])


def test_runs() -> None:
    assert [run.tolist() for run in runs_of(np.array([3, 4, 7, 9, 10]))] == [[3, 4], [7], [9, 10]]
