"""Voxtral: a sound of any length, in chunks of 30 seconds that the encoder takes one by one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import ModelError, RequestError
from engine.multimodal.processors.audio_features import MelSettings, log_mel, prepare
from engine.multimodal.processors.options import OPTIONS, refuse_options
from engine.multimodal.types import Audio, MediaKind, Processed

TEKKEN, TOKENIZER = "tekken.json", "tokenizer.json"
MOST, SECONDS = "max_seconds", 1800  # of a sound; the option and its default, for which the model was trained
BEGIN = "[BEGIN_AUDIO]"  # stands before the placeholders, as in mistral-common's prompts


class VoxtralProcessor:
    """The tensor is `input_features`, float32[chunks, bands, frames].

    Args:
        settings: of the features.
        audio_token: id of a placeholder.
        begin_token: id of the token before them; None if the tokenizer has none.
        chunk_tokens: embeddings of one chunk.
    """

    def __init__(self, settings: MelSettings, audio_token: int, begin_token: int | None, chunk_tokens: int):
        self._settings = settings
        self._audio = audio_token
        self._begin = [] if begin_token is None else [begin_token]
        self._chunk_tokens = chunk_tokens

    def process(self, kind: MediaKind, media: Audio, count: int, options: Mapping[str, Any]) -> Processed:
        del kind, count
        most, settings = self._most_seconds(options), self._settings
        samples = prepare(media, settings.sampling_rate)
        if len(samples) > most * settings.sampling_rate:
            raise RequestError(
                f"the audio has {len(samples) / settings.sampling_rate:.1f} s, the most is {most} s ({MOST} of "
                "--mm-processor-kwargs)",
                OPTIONS,
            )
        chunks = -(-len(samples) // settings.chunk_samples)
        padded = np.pad(samples, (0, chunks * settings.chunk_samples - len(samples)))
        # One spectrogram of the whole sound: its loudest value sets the floor of all chunks.
        features = log_mel(padded, settings).reshape(settings.feature_size, chunks, settings.chunk_frames)
        tensors = {"input_features": np.ascontiguousarray(features.transpose(1, 0, 2))}
        return Processed([*self._begin, *[self._audio] * (chunks * self._chunk_tokens)], tensors)

    def most_tokens(self, kind: MediaKind, options: Mapping[str, Any]) -> int:
        del kind
        return len(self._begin) + -(-self._most_seconds(options) // self._settings.chunk_length) * self._chunk_tokens

    def _most_seconds(self, options: Mapping[str, Any]) -> int:
        """The longest sound. Raises RequestError if an option is unknown or wrong."""
        refuse_options(options, (MOST,))
        most = options.get(MOST, SECONDS)
        if not isinstance(most, int) or most < 1:
            raise RequestError(f"{MOST} must be an integer of at least 1, not {most!r}", OPTIONS)
        return most


def make(folder: Path, hf_config: Any) -> VoxtralProcessor:
    """Raises ModelError if a chunk doesn't fit the encoder."""
    settings, audio = MelSettings.read(folder), hf_config.audio_config
    positions = audio.max_source_positions
    if settings.chunk_frames != 2 * positions:
        raise ModelError(
            f"{folder}: its feature extractor makes {settings.chunk_frames} frames of {settings.chunk_length} s, the "
            f"encoder takes {2 * positions} (max_source_positions)"
        )
    # The projector joins as many positions as fill the width of the encoder's MLP.
    joined = audio.intermediate_size // audio.hidden_size
    if positions % joined:
        raise ModelError(f"{folder}: the {positions} positions of its encoder are not a multiple of {joined}")
    return VoxtralProcessor(settings, hf_config.audio_token_id, _find_token(folder, BEGIN), positions // joined)


def _find_token(folder: Path, token: str) -> int | None:
    """The id of a special token, by the folder's tokenizer."""
    for file, table, name, number in (
        (TEKKEN, "special_tokens", "token_str", "rank"),
        (TOKENIZER, "added_tokens", "content", "id"),
    ):
        try:
            entries = json.loads((folder / file).read_text(encoding="utf-8")).get(table) or ()
        except OSError:
            continue
        found = next((entry[number] for entry in entries if entry.get(name) == token), None)
        if found is not None:
            return int(found)
    return None
