"""Decoded media."""

import msgspec
import numpy as np
from numpy.typing import NDArray


class Audio(msgspec.Struct, frozen=True, gc=False):
    """A decoded sound: float32[samples], mono."""

    samples: NDArray[np.float32]
    rate: int  # samples per second


class Video(msgspec.Struct, frozen=True, gc=False):
    """Decoded frames, uint8[frames, height, width, 3], and their times in seconds."""

    frames: NDArray[np.uint8]
    times: NDArray[np.float64]
    seconds: float = 0.0  # of the whole video; 0: unknown
