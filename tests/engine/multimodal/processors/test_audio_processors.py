"""Processors of audio against those of transformers."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import Qwen2AudioConfig, Qwen2AudioProcessor, VoxtralConfig, WhisperFeatureExtractor

from engine.errors import ModelError, RequestError
from engine.multimodal.processors import qwen2_audio, voxtral
from engine.multimodal.processors.audio_features import MelSettings, log_mel, mel_filters, prepare
from engine.multimodal.types import Audio

RATE = 16_000
AUDIO = 151646


def sound(seconds: float, rate: int = RATE, seed: int = 0) -> Audio:
    """A tone with noise and a pause."""
    count = round(seconds * rate)
    time = np.arange(count) / rate
    noise = np.random.default_rng(seed).standard_normal(count)
    samples = 0.3 * np.sin(2 * np.pi * 440 * time) + 0.05 * noise
    samples[count // 3 : count // 2] = 0
    return Audio(samples.astype(np.float32), rate)


@pytest.fixture
def qwen(tmp_path: Path) -> Any:
    WhisperFeatureExtractor(feature_size=128).save_pretrained(tmp_path)
    return qwen2_audio.make(tmp_path, Qwen2AudioConfig())


@pytest.fixture
def small_voxtral(tmp_path: Path) -> Any:
    """Chunks of one second."""
    write_preprocessor(tmp_path, feature_size=16, chunk_length=1, hop_length=200)
    return voxtral.make(tmp_path, voxtral_config())


def write_preprocessor(folder: Path, **fields: int) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))


def voxtral_config(positions: int = 40) -> Any:
    audio = {"hidden_size": 32, "intermediate_size": 128, "max_source_positions": positions, "num_mel_bins": 16}
    return VoxtralConfig(audio_config=audio, audio_token_id=24)


@pytest.mark.parametrize("bands", [80, 128])
def test_filters_are_those_of_whisper(bands: int) -> None:
    np.testing.assert_allclose(
        mel_filters(bands, 400, RATE), WhisperFeatureExtractor(feature_size=bands).mel_filters.T, atol=1e-8
    )


@pytest.mark.parametrize("seconds", [0.04, 1.0, 7.123, 30.0])
def test_qwen2_audio_equals_transformers(qwen: Any, seconds: float) -> None:
    audio = sound(seconds)
    extractor = WhisperFeatureExtractor(feature_size=128)
    reference = object.__new__(Qwen2AudioProcessor)
    reference.feature_extractor, reference.audio_token = extractor, "<|AUDIO|>"
    expected, texts = Qwen2AudioProcessor._process_audio(reference, [audio.samples], sampling_rate=RATE)
    found = qwen.process("audio", audio, 1, {})
    assert found.tokens == [AUDIO] * texts[0].count("<|AUDIO|>")
    assert found.tensors["frames"].tolist() == [expected["feature_attention_mask"].sum()]
    features = found.tensors["input_features"]
    assert features.shape == (128, 3000)
    np.testing.assert_allclose(features, expected["input_features"][0], atol=2e-4)


def test_voxtral_equals_transformers(small_voxtral: Any) -> None:
    audio = sound(2.3)
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=1, hop_length=200)
    whole = extractor(
        audio.samples, sampling_rate=RATE, padding=True, truncation=False, pad_to_multiple_of=RATE, return_tensors="np"
    )["input_features"]
    expected = whole.reshape(16, -1, 80).transpose(1, 0, 2)
    found = small_voxtral.process("audio", audio, 1, {})
    assert found.tokens == [24] * 3 * 10
    assert found.tensors["input_features"].shape == (3, 16, 80)
    np.testing.assert_allclose(found.tensors["input_features"], expected, atol=2e-4)


def test_voxtral_at_its_real_size(tmp_path: Path) -> None:
    """375 embeddings for each 30 seconds, after the token that mistral-common writes before them."""
    special = [{"rank": 24, "token_str": "[AUDIO]"}, {"rank": 25, "token_str": "[BEGIN_AUDIO]"}]
    (tmp_path / "tekken.json").write_text(json.dumps({"special_tokens": special}))
    found = voxtral.make(tmp_path, VoxtralConfig(audio_token_id=24)).process("audio", sound(31.0), 1, {})
    assert found.tokens == [25] + [24] * 750
    assert found.tensors["input_features"].shape == (2, 128, 3000)


def test_begin_token_of_a_tokenizer_file(tmp_path: Path) -> None:
    write_preprocessor(tmp_path, feature_size=16, chunk_length=1, hop_length=200)
    added = [{"id": 7, "content": "[BEGIN_AUDIO]"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert voxtral.make(tmp_path, voxtral_config()).process("audio", sound(0.5), 1, {}).tokens[0] == 7


def test_chunks_that_do_not_fit_the_encoder_are_refused(tmp_path: Path) -> None:
    write_preprocessor(tmp_path, feature_size=16, chunk_length=2)
    with pytest.raises(ModelError, match="200 frames of 2 s, the encoder takes 80"):
        voxtral.make(tmp_path, voxtral_config())


def test_other_rates_are_resampled(qwen: Any) -> None:
    """A tone has its peak in the same band, and as many tokens, at any rate."""
    expected = qwen.process("audio", sound(2.0), 1, {})
    for rate in (8_000, 44_100, 48_000):
        found = qwen.process("audio", sound(2.0, rate), 1, {})
        assert len(found.tokens) == len(expected.tokens)
        peaks = [one.tensors["input_features"][:, 20].argmax() for one in (found, expected)]
        assert peaks[0] == peaks[1]


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (Audio(np.zeros(0, np.float32), RATE), "no samples"),
        (Audio(np.full(8000, np.nan, np.float32), RATE), "not finite numbers"),
        (Audio(np.array([0, np.inf] * 4000, np.float32), RATE), "not finite numbers"),
        (Audio(np.zeros(8000, np.float32), 0), "a rate of 0 samples per second"),
        (Audio(np.zeros(1, np.float32), 48_000), "too short"),
        (Audio(np.zeros(320, np.float32), RATE), "too short: 320 samples"),
        (Audio(np.zeros(RATE * 30 + 1, np.float32), RATE), "the model takes at most 30 s"),
    ],
)
def test_sounds_that_are_refused(qwen: Any, audio: Audio, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        qwen.process("audio", audio, 1, {})


def test_options_are_refused(qwen: Any) -> None:
    with pytest.raises(RequestError, match="has no option 'max_crops'; it has none"):
        qwen.process("audio", sound(1.0), 1, {"max_crops": 2})


def test_most_tokens(qwen: Any, small_voxtral: Any) -> None:
    longest = Audio(np.zeros(30 * RATE, np.float32), RATE)
    assert qwen.most_tokens("audio", {}) == len(qwen.process("audio", longest, 1, {}).tokens) == 750
    assert small_voxtral.most_tokens("audio", {}) == 1800 * 10
    assert small_voxtral.most_tokens("audio", {"max_seconds": 3}) == 30


def test_longest_sound_of_voxtral(small_voxtral: Any) -> None:
    assert len(small_voxtral.process("audio", sound(2.0), 1, {"max_seconds": 2}).tokens) == 20
    with pytest.raises(RequestError, match=r"has 2\.1 s, the most is 2 s \(max_seconds"):
        small_voxtral.process("audio", sound(2.1), 1, {"max_seconds": 2})
    with pytest.raises(RequestError, match="max_seconds must be an integer of at least 1, not 0"):
        small_voxtral.process("audio", sound(2.1), 1, {"max_seconds": 0})


def test_shortest_sound(qwen: Any) -> None:
    assert len(qwen.process("audio", Audio(np.zeros(321, np.float32), RATE), 1, {}).tokens) == 1


def test_silence_is_finite(small_voxtral: Any) -> None:
    found = small_voxtral.process("audio", Audio(np.zeros(10, np.float32), RATE), 1, {})
    assert np.isfinite(found.tensors["input_features"]).all()
    assert len(found.tokens) == 10


def test_settings_that_are_refused(tmp_path: Path) -> None:
    write_preprocessor(tmp_path, hop_length=0)
    with pytest.raises(ModelError, match="hop_length of its feature extractor must be at least 1, not 0"):
        MelSettings.read(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("[1]")
    with pytest.raises(ModelError, match="must be a JSON object"):
        MelSettings.read(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelError, match="can't be read"):
        MelSettings.read(tmp_path)


def test_settings_of_a_nested_file(tmp_path: Path) -> None:
    write_preprocessor(tmp_path, feature_size=80)
    (tmp_path / "processor_config.json").write_text(json.dumps({"feature_extractor": {"feature_size": 96}}))
    assert MelSettings.read(tmp_path).feature_size == 96


def test_features_in_float32(qwen: Any) -> None:
    settings = MelSettings(feature_size=16, chunk_length=1)
    assert log_mel(prepare(sound(1.0), RATE), settings).dtype == np.float32
    assert SimpleNamespace(**qwen.process("audio", sound(1.0), 1, {}).tensors).input_features.dtype == np.float32
