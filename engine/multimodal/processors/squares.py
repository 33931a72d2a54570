"""The size at which the Qwen-VL families take an image."""

import math


def fit(height: int, width: int, factor: int, limits: tuple[int, int]) -> tuple[int, int]:
    """The multiples of `factor` nearest to a height and width, scaled if they have too few or too many pixels."""
    fewest, most = limits
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor * factor > most:
        scale = math.sqrt(height * width / most)
        rows, columns = (max(1, math.floor(side / scale / factor)) for side in (height, width))
    elif rows * columns * factor * factor < fewest:
        scale = math.sqrt(fewest / (height * width))
        rows, columns = (math.ceil(side * scale / factor) for side in (height, width))
    return rows * factor, columns * factor
