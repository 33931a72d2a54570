"""Least squares with coefficients that are not negative."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
TOLERANCE = 1e-10


def nonnegative_least_squares(matrix: Floats, values: Floats) -> Floats:
    """The x >= 0 with the least |matrix x - values|: the active set method of Lawson and Hanson (1974), chapter 23.

    Columns are scaled to length 1 meanwhile, so that units of the coefficients don't matter.
    """
    lengths = np.linalg.norm(matrix, axis=0)
    scale = np.where(lengths > 0, lengths, 1.0)
    scaled = matrix / scale
    x = np.zeros(scaled.shape[1])
    free = np.zeros(len(x), bool)
    for _ in range(3 * len(x) + 3):
        gradient = scaled.T @ (values - scaled @ x)
        gradient[free] = -np.inf
        if free.all() or gradient.max() <= TOLERANCE * np.linalg.norm(values):
            break
        free[int(gradient.argmax())] = True
        while True:
            candidate = np.zeros_like(x)
            candidate[free] = np.linalg.lstsq(scaled[:, free], values, rcond=None)[0]
            wrong = free & (candidate <= 0)
            if not wrong.any():
                break
            step = (x[wrong] / np.maximum(x[wrong] - candidate[wrong], 1e-300)).min()
            x += step * (candidate - x)
            free &= x > TOLERANCE
            x[~free] = 0.0
        x = candidate
    return x / scale
