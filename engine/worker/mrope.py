"""Rotary positions of models with M-RoPE (Qwen-VL): time, height and width of each token.

Text counts on in all three sections. An input with a grid of f frames, r rows and c columns begins at the next position
p: its embeddings have time p + frame, height p + row, width p + column, and the text after it begins at
p + max(r, c), whatever f is. Example: text, an image of 2 rows and 3 columns, text:

    tokens   a  b  .  .  .  .  .  .  c
    time     0  1  2  2  2  2  2  2  5
    height   0  1  2  2  2  3  3  3  5
    width    0  1  2  3  4  2  3  4  5

The next token (index 9) has position 6 in all sections: positions of generated tokens differ from their indices by -3.
Times of a long video can be above the positions of the text after it; text counts on from text even then.

Source: Wang et al., Qwen2-VL (arXiv 2409.12191) and Bai et al., Qwen2.5-VL (arXiv 2502.13923), with time in seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.arrays import Int64s


@dataclass(frozen=True, slots=True)
class GridInput:
    """An input in a prompt: the positions of its embeddings, ascending, and what `MMInputRef` has of them."""

    at: Int64s
    grid: tuple[int, int, int]
    seconds_per_frame: float = 0.0


def rotary_positions(
    num_tokens: int, inputs: Sequence[GridInput], tokens_per_second: float | None = None
) -> tuple[Int64s, int]:
    """The positions of a prompt, int64[3, num_tokens], and what is added to the index of each later token.

    The embeddings of an input lie end to end, or frame by frame with text between them (videos of Qwen3-VL); each frame
    is an image then.

    Args:
        num_tokens: of the prompt.
        inputs: by position.
        tokens_per_second: positions per second of a video; None: each frame is one position.
    """
    out = np.empty((3, num_tokens), dtype=np.int64)
    known, position = 0, 0  # tokens with positions, and the next one's
    for one in inputs:
        frames, rows, columns = one.grid
        if frames * rows * columns != len(one.at):
            raise RuntimeError(f"an input with a grid of {frames} × {rows} × {columns} has {len(one.at)} embeddings")
        runs = runs_of(one.at)
        per_run = frames if len(runs) == 1 else 1
        interval = tokens_per_second * one.seconds_per_frame if tokens_per_second and one.seconds_per_frame else 1
        time = (np.arange(per_run, dtype=np.float32) * np.float32(interval)).astype(np.int64)
        grid = np.stack(np.meshgrid(time, np.arange(rows), np.arange(columns), indexing="ij")).reshape(3, -1)
        for run in runs:
            first = int(run[0])
            out[:, known:first] = np.arange(position, position + first - known)
            position += first - known
            known = first + len(run)
            out[:, first:known] = grid + position
            position += max(rows, columns)
    out[:, known:] = np.arange(position, position + num_tokens - known)
    return out, position - known


def runs_of(at: Int64s) -> list[Int64s]:
    """Ascending positions, divided where one isn't followed by the next."""
    return np.split(at, np.flatnonzero(np.diff(at) != 1) + 1)
