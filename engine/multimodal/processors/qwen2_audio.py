"""Qwen2-Audio: one sound of up to 30 seconds, with as many placeholder tokens as its length asks for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import RequestError
from engine.multimodal.processors.audio_features import MelSettings, log_mel, prepare
from engine.multimodal.processors.options import refuse_options
from engine.multimodal.types import Audio, MediaKind, Processed


class Qwen2AudioProcessor:
    """The tensors are `input_features`, float32[bands, frames] of the padded sound, and `frames`, int64[1]."""

    def __init__(self, settings: MelSettings, audio_token: int):
        self._settings = settings
        self._token = audio_token

    def process(self, kind: MediaKind, media: Audio, count: int, options: Mapping[str, Any]) -> Processed:
        del kind, count
        refuse_options(options)
        settings = self._settings
        samples = prepare(media, settings.sampling_rate)
        if len(samples) > settings.chunk_samples:
            raise RequestError(
                f"the audio has {len(samples) / settings.sampling_rate:.1f} s, the model takes at most "
                f"{settings.chunk_length} s"
            )
        frames = -(-len(samples) // settings.hop_length)
        tokens = num_tokens(frames)
        if tokens < 1:
            raise RequestError(
                f"the audio is too short: {len(samples)} samples at {settings.sampling_rate} per second; the model "
                f"needs more than {2 * settings.hop_length}"
            )
        padded = np.pad(samples, (0, settings.chunk_samples - len(samples)))
        tensors: dict[str, NDArray[Any]] = {
            "input_features": log_mel(padded, settings),
            "frames": np.array([frames], dtype=np.int64),
        }
        return Processed([self._token] * tokens, tensors)

    def most_tokens(self, kind: MediaKind, options: Mapping[str, Any]) -> int:
        del kind, options
        return num_tokens(self._settings.chunk_frames)


def num_tokens(frames: int) -> int:
    """Embeddings of a sound with `frames` frames: a convolution and a mean, both with stride 2."""
    convolved = (frames - 1) // 2 + 1
    return (convolved - 2) // 2 + 1


def make(folder: Path, hf_config: Any) -> Qwen2AudioProcessor:
    return Qwen2AudioProcessor(MelSettings.read(folder), hf_config.audio_token_index)
