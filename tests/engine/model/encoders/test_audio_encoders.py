"""Encoders of audio: the class with audio as input, against the class with our embeddings."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
)

from engine.model.encoders import qwen2_audio, voxtral
from engine.multimodal.processors.audio_features import MelSettings
from engine.multimodal.processors.qwen2_audio import Qwen2AudioProcessor
from engine.multimodal.processors.voxtral import VoxtralProcessor
from engine.multimodal.types import Audio, Processed

RATE, AUDIO = 16_000, 7
SETTINGS = MelSettings(feature_size=16, chunk_length=1)
COARSE = MelSettings(feature_size=16, chunk_length=1, hop_length=200)  # a multiple of 4 positions
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
TOLERANCE = 2e-5


def sound(seconds: float, seed: int) -> Audio:
    noise = np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    return Audio((0.1 * noise).astype(np.float32), RATE)


def tensors_of(processed: Processed) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in processed.tensors.items()}


def put_in(model: Any, ids: Tensor, embeddings: Tensor) -> Tensor:
    """The logits of a prompt with these embeddings in the place of its placeholders."""
    inputs = model.get_input_embeddings()(ids)
    inputs[ids == AUDIO] = embeddings
    return model(inputs_embeds=inputs).logits


@pytest.fixture(scope="module")
def qwen() -> Any:
    torch.manual_seed(0)
    audio = {
        "num_mel_bins": 16,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "d_model": 32,
        "max_source_positions": 50,
    }
    config = Qwen2AudioConfig(audio_config=audio, text_config=TEXT, audio_token_index=AUDIO)
    return Qwen2AudioForConditionalGeneration(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def small_voxtral() -> Any:
    torch.manual_seed(1)
    audio = {
        "num_mel_bins": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 128,
        "max_source_positions": 40,
    }
    config = VoxtralConfig(audio_config=audio, text_config=TEXT, audio_token_id=AUDIO)
    return VoxtralForConditionalGeneration(config).eval().requires_grad_(False)


def test_qwen2_audio_equals_the_class(qwen: Any) -> None:
    """Two sounds of different lengths, padded by the class."""
    processor, encoder = Qwen2AudioProcessor(SETTINGS, AUDIO), qwen2_audio.make(qwen)
    some = [processor.process("audio", sound(seconds, seed), 2, {}) for seconds, seed in ((0.4, 1), (0.93, 2))]
    ids = torch.tensor([[1, 2, *some[0].tokens, 3, *some[1].tokens, 4, 5]])
    features = torch.stack([tensors_of(one)["input_features"] for one in some])
    frames = torch.cat([tensors_of(one)["frames"] for one in some])
    mask = (torch.arange(100) < frames[:, None]).long()
    expected = qwen(input_ids=ids, input_features=features, feature_attention_mask=mask).logits
    embeddings = [encoder.encode(tensors_of(one)).embeddings for one in some]
    assert [len(one) for one in embeddings] == [len(one.tokens) for one in some] == [10, 23]
    found = put_in(qwen, ids, torch.cat(embeddings))
    assert (found - expected).abs().max() < TOLERANCE
    swapped = put_in(qwen, ids, torch.cat(embeddings[::-1]))
    assert (swapped - expected).abs().max() > 100 * TOLERANCE


def test_voxtral_equals_the_class(small_voxtral: Any) -> None:
    """A sound of three chunks and one of a single chunk."""
    processor, encoder = VoxtralProcessor(COARSE, AUDIO, 9, 10), voxtral.make(small_voxtral)
    some = [processor.process("audio", sound(seconds, seed), 2, {}) for seconds, seed in ((2.3, 1), (0.4, 2))]
    ids = torch.tensor([[1, 2, *some[0].tokens, 3, *some[1].tokens, 4, 5]])
    features = torch.cat([tensors_of(one)["input_features"] for one in some])
    expected = small_voxtral(input_ids=ids, input_features=features).logits
    embeddings = [encoder.encode(tensors_of(one)).embeddings for one in some]
    assert [len(one) for one in embeddings] == [30, 10]
    found = put_in(small_voxtral, ids, torch.cat(embeddings))
    assert (found - expected).abs().max() < TOLERANCE
    swapped = put_in(small_voxtral, ids, torch.cat([embeddings[1], embeddings[0]]))
    assert (swapped - expected).abs().max() > 100 * TOLERANCE


def test_embeddings_have_the_dtype_of_the_model(qwen: Any) -> None:
    processed = Qwen2AudioProcessor(SETTINGS, AUDIO).process("audio", sound(0.5, 3), 1, {})
    in_bfloat16 = qwen2_audio.make(Qwen2AudioForConditionalGeneration(qwen.config).bfloat16())
    assert in_bfloat16.encode(tensors_of(processed)).embeddings.dtype == torch.bfloat16
