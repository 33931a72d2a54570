"""Log-mel spectrograms, as Whisper and the models with its encoder take them."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import ModelError, RequestError
from engine.multimodal.types import Audio

# Either may have the settings; processor_config.json wins, as in transformers.
NESTED, OWN = ("processor_config.json", "feature_extractor"), "preprocessor_config.json"
FLOOR = 1e-10  # of the power in a band, before the logarithm
RANGE = 8.0  # decades below the loudest value that are kept


@dataclass(frozen=True, slots=True)
class MelSettings:
    """How sound becomes features; the fields of preprocessor_config.json.

    Args:
        feature_size: bands of the mel scale.
        sampling_rate: samples per second.
        hop_length: samples between two frames.
        n_fft: samples of a frame.
        chunk_length: seconds that the encoder takes at once.
    """

    feature_size: int = 128
    sampling_rate: int = 16_000
    hop_length: int = 160
    n_fft: int = 400
    chunk_length: int = 30

    @classmethod
    def read(cls, folder: Path) -> "MelSettings":
        """The settings of a model's folder; Whisper's where it has none.

        Raises ModelError if a file can't be read or has a size below 1.
        """
        declared = _read_object(folder / NESTED[0]).get(NESTED[1])
        if not isinstance(declared, dict):
            declared = _read_object(folder / OWN)
        fields = {name: declared[name] for name in cls.__dataclass_fields__ if name in declared}
        for name, value in fields.items():
            if not isinstance(value, int) or value < 1:
                raise ModelError(f"{folder}: {name} of its feature extractor must be at least 1, not {value!r}")
        return cls(**fields)

    @property
    def chunk_samples(self) -> int:
        return self.chunk_length * self.sampling_rate

    @property
    def chunk_frames(self) -> int:
        return self.chunk_samples // self.hop_length


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} can't be read: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file} must be a JSON object")
    return found


def prepare(audio: Audio, rate: int) -> NDArray[np.float32]:
    """The samples at another rate, float32[samples].

    Raises RequestError for a sound without samples, or with values that are not numbers.
    """
    if not len(audio.samples):
        raise RequestError("the audio has no samples")
    if audio.rate < 1:
        raise RequestError(f"the audio has a rate of {audio.rate} samples per second")
    samples = np.ascontiguousarray(audio.samples, dtype=np.float32)
    if not np.isfinite(samples).all():
        raise RequestError("the audio has samples that are not finite numbers")
    if audio.rate == rate:
        return samples
    import soxr

    resampled: NDArray[np.float32] = soxr.resample(samples, audio.rate, rate, quality="HQ")
    if not len(resampled):
        raise RequestError(f"the audio is too short: {len(samples)} samples at {audio.rate} per second")
    return resampled


def log_mel(samples: NDArray[np.float32], settings: MelSettings) -> NDArray[np.float32]:
    """The features of a sound whose length is a multiple of the hop: float32[bands, samples / hop].

    The frames are centered, with the sound mirrored at both ends. Values are clipped to `RANGE` decades below the
    loudest one, and scaled to about -1 to 1.
    """
    size, hop = settings.n_fft, settings.hop_length
    mirrored = np.pad(samples, size // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(mirrored, size)[::hop][: len(samples) // hop]
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)
    spectrum = np.fft.rfft(frames * window)
    power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32)
    filters = mel_filters(settings.feature_size, size, settings.sampling_rate)
    logs = np.log10(np.maximum(filters @ power.T, np.float32(FLOOR)))
    scaled = (np.maximum(logs, logs.max() - np.float32(RANGE)) + np.float32(4)) / np.float32(4)
    return np.ascontiguousarray(scaled, dtype=np.float32)


@functools.cache
def mel_filters(bands: int, n_fft: int, rate: int) -> NDArray[np.float32]:
    """Triangular filters over the frequencies of a spectrum, float32[bands, n_fft / 2 + 1].

    Slaney's mel scale (Auditory Toolbox, 1998) from 0 to 8,000 Hz: linear up to 1,000 Hz, logarithmic above. All
    filters have the same area.
    """
    frequencies = np.linspace(0, rate // 2, n_fft // 2 + 1)
    corners = _hertz(np.linspace(0.0, _mel(8000.0), bands + 2))
    left, center, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising = (frequencies - left) / (center - left)
    falling = (right - frequencies) / (right - center)
    triangles = np.maximum(0, np.minimum(rising, falling))
    return np.asarray(triangles * (2.0 / (right - left)), dtype=np.float32)


HERTZ_PER_MEL = 200 / 3  # of the linear part
CORNER_HERTZ, CORNER_MEL = 1000.0, 15.0
LOG_STEP = np.log(6.4) / 27  # of the logarithmic part, per mel


def _mel(hertz: float) -> float:
    if hertz < CORNER_HERTZ:
        return hertz / HERTZ_PER_MEL
    return float(CORNER_MEL + np.log(hertz / CORNER_HERTZ) / LOG_STEP)


def _hertz(mels: NDArray[np.float64]) -> NDArray[np.float64]:
    logarithmic = CORNER_HERTZ * np.exp(LOG_STEP * (mels - CORNER_MEL))
    return np.where(mels < CORNER_MEL, HERTZ_PER_MEL * mels, logarithmic)
