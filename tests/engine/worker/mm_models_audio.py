"""Qwen2-Audio (Qwen2) and Voxtral (Llama), both with a tower like Whisper's, on sounds of about a second."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.multimodal.types import Audio, Processed
from tests.engine.worker.mm_model import TEXT, MMModel, save

RATE, AUDIO, BEGIN = 16_000, 100, 101
FRAMES, POSITIONS = 80, 40  # of a second
TOWER = {
    "num_mel_bins": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "intermediate_size": 128,
    "max_source_positions": POSITIONS,
    "initializer_range": 0.15,
}


def noise(number: int, length: int) -> Audio:
    """Noise of so many eighths of a second."""
    samples = np.random.default_rng(number).standard_normal(RATE * length // 8)
    return Audio((0.1 * samples).astype(np.float32), RATE)


def sound(number: int) -> Audio:
    """Each number is another sound; 1 and 2 have the same length, so that they can be exchanged."""
    return noise(number, 3 + 2 * ((number + 1) // 2 % 3))


def long_sound(number: int) -> Audio:
    """As `sound`, of one chunk or two."""
    return noise(number, 3 + 8 * ((number + 1) // 2 % 2))


def write_options(folder: Path) -> None:
    fields = {"feature_size": 16, "chunk_length": 1, "hop_length": RATE // FRAMES}
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))


def build_qwen2_audio(folder: Path) -> Any:
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    torch.manual_seed(7)
    text = {"model_type": "qwen2", **TEXT}
    names = {"num_hidden_layers": "encoder_layers", "num_attention_heads": "encoder_attention_heads"}
    names |= {"hidden_size": "d_model", "intermediate_size": "encoder_ffn_dim"}
    tower = {names.get(name, name): value for name, value in TOWER.items()}
    config = Qwen2AudioConfig(audio_config=tower, text_config=text, audio_token_index=AUDIO)
    write_options(folder)
    return save(Qwen2AudioForConditionalGeneration._from_config(config, dtype=torch.float32), folder, (AUDIO,))


def qwen2_audio_tensors(ids: torch.Tensor, processed: list[Processed]) -> dict[str, Any]:
    del ids
    if not processed:
        return {}
    frames = torch.tensor([one.tensors["frames"][0] for one in processed])
    features = torch.from_numpy(np.stack([one.tensors["input_features"] for one in processed]))
    return {"input_features": features, "feature_attention_mask": (torch.arange(FRAMES) < frames[:, None]).long()}


def build_voxtral(folder: Path) -> Any:
    from transformers import VoxtralConfig, VoxtralForConditionalGeneration

    torch.manual_seed(7)
    text = {"model_type": "llama", "head_dim": 8, **TEXT}
    config = VoxtralConfig(audio_config=TOWER, text_config=text, audio_token_id=AUDIO)
    write_options(folder)
    added = [{"id": BEGIN, "content": "[BEGIN_AUDIO]"}]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    return save(VoxtralForConditionalGeneration._from_config(config, dtype=torch.float32), folder, (AUDIO, BEGIN))


def voxtral_tensors(ids: torch.Tensor, processed: list[Processed]) -> dict[str, Any]:
    del ids
    if not processed:
        return {}
    return {"input_features": torch.from_numpy(np.concatenate([one.tensors["input_features"] for one in processed]))}


MODELS = {
    "qwen2_audio": MMModel(build_qwen2_audio, qwen2_audio_tensors, sound, "audio"),
    "voxtral": MMModel(build_voxtral, voxtral_tensors, long_sound, "audio"),
}
