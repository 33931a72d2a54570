"""Decoding of sounds with libsndfile: from bytes that a client sent to mono samples, within limits."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError, RequestError
from engine.media.limits import MediaLimits
from engine.media.types import Audio

FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3", "AIFF", "AU")
SHOWN_FORMATS = "WAV, FLAC, OGG (Vorbis, Opus), MP3, AIFF and AU"
RATES = range(1_000, 384_001)  # samples per second
BLOCK = 1 << 18  # values decoded at a time, of all channels
EXTRA = "pip install 'redline-llm[audio]'"


def decode_audio(data: bytes, limits: MediaLimits) -> Audio:
    """Decode a sound to mono at its own rate; the processor of a model resamples it (`resample`).

    Channels are averaged. The duration is checked against the header, then against what is decoded.

    Args:
        data: the file.
        limits: seconds, samples and channels.

    Raises:
        RequestError: the format isn't accepted, a limit is exceeded, there are no samples, or some aren't finite.
        ConfigError: the library isn't installed.
    """
    try:
        import soundfile
    except ImportError as error:
        raise ConfigError(f"audio is decoded by soundfile, which isn't installed: {EXTRA}") from error
    if not data:
        raise RequestError("the audio is empty (0 bytes)")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_header(file, limits)
            samples = _read(file, limits)
            rate = int(file.samplerate)
    except RequestError:
        raise
    except soundfile.LibsndfileError as error:
        raise RequestError(
            f"the audio can't be decoded: {error.error_string.rstrip('.')}; accepted are {SHOWN_FORMATS}"
        ) from error
    except Exception as error:  # of a damaged file
        raise RequestError(f"the audio can't be decoded: {error}") from error
    if not np.isfinite(samples).all():
        raise RequestError("the audio has samples that are not finite numbers (NaN or infinity)")
    return Audio(samples, rate)


def resample(audio: Audio, rate: int) -> NDArray[np.float32]:
    """The samples at another rate, by soxr's band-limited interpolation; unchanged at the same rate."""
    if audio.rate == rate:
        return audio.samples
    try:
        import soxr
    except ImportError as error:
        raise ConfigError(f"audio is resampled by soxr, which isn't installed: {EXTRA}") from error
    found: NDArray[np.float32] = soxr.resample(audio.samples, audio.rate, rate)
    return found


def _check_header(file: Any, limits: MediaLimits) -> None:
    if file.format not in FORMATS:
        raise RequestError(f"the audio is {file.format}, but accepted are {SHOWN_FORMATS}")
    if file.samplerate not in RATES:
        raise RequestError(
            f"the audio has {file.samplerate:,} samples per second, but {RATES[0]:,} to {RATES[-1]:,} are accepted"
        )
    if file.channels > limits.max_channels:
        raise RequestError(f"the audio has {file.channels:,} channels, but at most {limits.max_channels} are accepted")
    if file.frames == 0:
        raise RequestError("the audio has no samples")
    _check_length(file.frames, file.samplerate, limits)


def _check_length(frames: int, rate: int, limits: MediaLimits) -> None:
    if frames > limits.max_seconds * rate:
        raise RequestError(
            f"the audio takes {frames / rate:,.1f} s, but at most {limits.max_seconds:g} s are allowed "
            "(--max-media-seconds)"
        )
    if frames > limits.max_samples:
        raise RequestError(f"the audio has {frames:,} samples, but at most {limits.max_samples:,} are accepted")


def _read(file: Any, limits: MediaLimits) -> NDArray[np.float32]:
    """All samples, averaged over the channels. A header may announce fewer frames than follow."""
    blocks: list[NDArray[np.float32]] = []
    frames, size = 0, max(BLOCK // file.channels, 1)
    while len(block := file.read(size, dtype="float32", always_2d=True)):
        frames += len(block)
        _check_length(frames, file.samplerate, limits)
        blocks.append(block[:, 0] if file.channels == 1 else block.mean(axis=1, dtype=np.float32))
    if not frames:
        raise RequestError("the audio has no samples")
    return np.concatenate(blocks)
