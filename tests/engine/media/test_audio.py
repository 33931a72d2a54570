"""Sounds: values, limits from the header and while decoding, reasons for what is refused."""

import io
import struct
from typing import Any

import numpy as np
import pytest
import soundfile

from engine.errors import RequestError
from engine.media.audio import decode_audio, resample
from engine.media.limits import MediaLimits

LIMITS = MediaLimits()
RATE = 16_000
TONE = np.sin(np.arange(RATE // 2) * 2 * np.pi * 440 / RATE).astype(np.float32) / 2


def encode(samples: np.ndarray[Any, Any], kind: str = "WAV", rate: int = RATE, **options: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, **options)
    return file.getvalue()


def float_wav(samples: np.ndarray[Any, Any], rate: int = RATE) -> bytes:
    """A WAV of float32 as it is, also NaN."""
    data = samples.astype("<f4").tobytes()
    form = struct.pack("<HHIIHH", 3, 1, rate, rate * 4, 4, 32)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def refusal(data: bytes, limits: MediaLimits = LIMITS) -> str:
    with pytest.raises(RequestError) as caught:
        decode_audio(data, limits)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_lossless_formats_have_the_samples() -> None:
    for kind in ("WAV", "FLAC", "AIFF"):
        found = decode_audio(encode(TONE, kind), LIMITS)
        assert (found.rate, found.samples.dtype) == (RATE, np.float32)
        np.testing.assert_allclose(found.samples, TONE, atol=2**-15)
    np.testing.assert_array_equal(decode_audio(float_wav(TONE), LIMITS).samples, TONE)


@pytest.mark.parametrize(
    ("kind", "options"), [("MP3", {}), ("OGG", {"subtype": "VORBIS"}), ("OGG", {"subtype": "OPUS"})]
)
def test_lossy_formats_are_decoded(kind: str, options: dict[str, Any]) -> None:
    found = decode_audio(encode(TONE, kind, **options), LIMITS)
    strength = np.abs(np.fft.rfft(found.samples * np.hanning(len(found.samples))))
    assert abs(np.argmax(strength) * found.rate / len(found.samples) - 440) < 4


def test_channels_are_averaged() -> None:
    stereo = np.stack([TONE, np.zeros_like(TONE)], axis=1)
    np.testing.assert_allclose(decode_audio(encode(stereo), LIMITS).samples, TONE / 2, atol=2**-14)


def test_resampling_keeps_the_tone() -> None:
    audio = decode_audio(encode(TONE, rate=RATE), LIMITS)
    assert resample(audio, RATE) is audio.samples
    half = resample(audio, RATE // 2)
    assert len(half) == len(TONE) // 2
    np.testing.assert_allclose(half[500:-500], TONE[1000:-1000:2], atol=1e-3)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_are_refused(wrong: float) -> None:
    samples = TONE.copy()
    samples[7] = wrong
    assert "not finite" in refusal(float_wav(samples))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (float_wav(TONE[:0]), "no samples"),
        (b"not audio at all" * 9, "can't be decoded"),
        (encode(TONE)[:20], "can't be decoded"),
        (encode(TONE, "CAF"), "accepted are WAV"),
        (float_wav(TONE, rate=10), "10 samples per second"),
        (float_wav(TONE, rate=2_000_000), "samples per second"),
    ],
)
def test_what_is_no_sound_is_refused_with_a_reason(data: bytes, reason: str) -> None:
    assert reason in refusal(data)


def test_limits() -> None:
    data = encode(np.tile(TONE, 8))
    assert "takes 4.0 s, but at most 2 s are allowed (--max-media-seconds)" in refusal(data, MediaLimits(max_seconds=2))
    assert "samples, but at most 1,000" in refusal(data, MediaLimits(max_samples=1000))
    many = encode(np.zeros((4, 8), np.float32))
    assert "8 channels" in refusal(many, MediaLimits(max_channels=2))
