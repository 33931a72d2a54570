"""What must be known of a model's multimodal inputs before it is loaded: their tokens, and the memory they need."""

import importlib
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.multimodal.expansion import NAMES
from engine.multimodal.families import MM_FAMILIES, MMFamily, embedding_ids, placeholder_ids
from engine.multimodal.processors.added_tokens import added_tokens
from engine.multimodal.types import MMSpec

_TOWERS = ("vision_config", "vit_config", "audio_config")
CROPPED = ("molmo", "molmo2")
CROPPED_POSITIONS_PER_TOKEN = 6  # four become one, and the margins of crops are computed twice
AUDIO_POSITIONS_PER_TOKEN = 4  # at most, in the towers of Qwen2-Audio and Voxtral


@dataclass(frozen=True, slots=True)
class MMFacts:
    """The multimodal inputs of a model.

    Args:
        spec: what front ends must know.
        embedding_ids: tokens that stand for an embedding within the tokens of an input.
        embedding_bytes: of one token in the encoder cache, with the features that are added to later layers.
        encoder_workspace: bytes that the encoder of the largest input needs besides its weights; an estimate.
        unsplit_tokens: the most tokens of inputs that are computed in one step; 0: all inputs can be split.
        warnings: which kinds the model doesn't take for lack of a token.
        encoder_parameters: number of parameters outside the decoder and the head.
        deepstack_layers: the first layers, after which features of inputs are added.
    """

    spec: MMSpec
    embedding_ids: frozenset[int]
    embedding_bytes: int
    encoder_workspace: int
    unsplit_tokens: int = 0
    encoder_parameters: int = 0
    warnings: tuple[str, ...] = ()
    deepstack_layers: int = 0

    @property
    def most_tokens(self) -> int:
        """Of the largest input."""
        return max(self.spec.most_tokens.values(), default=0)


def read_mm_facts(
    path: Path,
    hf_config: Any,
    itemsize: int,
    longest: int,
    options: Mapping[str, Any],
    per_prompt: Mapping[str, int],
    video_frames: int,
) -> MMFacts | None:
    """The facts about the inputs of a model; None if it takes texts only.

    Args:
        path: the model's folder, or its config.json.
        hf_config: of the whole model.
        itemsize: bytes of a number of the model's dtype.
        longest: tokens of a request at most; none has an input with more.
        options: those of --mm-processor-kwargs.
        per_prompt: --limit-mm-per-prompt.
        video_frames: --video-frames.
    """
    family = MM_FAMILIES.get(hf_config.model_type)
    if family is None:
        return None
    folder = path if path.is_dir() else path.parent
    placeholders = placeholder_ids(family, hf_config, added_tokens(folder))
    limits = _limits(family, set(map(str, placeholders)), per_prompt)
    processor = importlib.import_module(f"engine.multimodal.processors.{family.processor}").make(folder, hf_config)
    absent = {kind: text for kind, text in family.written.items() if kind not in placeholders}
    frames = {"video": (video_frames,)}
    most: dict[str, int] = {
        kind: min(int(processor.most_tokens(kind, options, *frames.get(kind, ()))), longest)
        if per_prompt.get(kind) != 0
        else 0
        for kind in placeholders
    }
    # Videos are encoded in parts, so that an encoder has fewer embeddings at once than the input.
    at_once = getattr(processor, "most_at_once", processor.most_tokens)
    encoded = max(min(number, int(at_once(kind, options))) for kind, number in most.items())
    text_config = hf_config.get_text_config(decoder=True)
    hidden = text_config.hidden_size
    layers = 1 + (len(hf_config.vision_config.deepstack_visual_indexes) if family.deepstack else 0)
    return MMFacts(
        MMSpec(
            hf_config.model_type,
            dict[str, int](placeholders.items()),
            most,
            limits,
            getattr(text_config, "additional_vocab_size", None) or 0,
            alone=family.alone or "",
        ),
        embedding_ids(family, hf_config),
        layers * hidden * itemsize,
        _encoder_workspace(hf_config, encoded, itemsize) + max(most.values()) * layers * hidden * itemsize,
        _unsplit_tokens(family, most, limits, longest),
        warnings=tuple(
            f"{NAMES[kind][1]} are refused: the tokenizer has no token {text}, which stands for one in a prompt"
            for kind, text in absent.items()
        ),
        deepstack_layers=layers - 1,
    )


def _limits(family: MMFamily, kinds: Set[str], per_prompt: Mapping[str, int]) -> dict[str, int]:
    """The most inputs of a prompt, by kind. Raises ConfigError for a limit that the family can't have."""
    limits = {kind: number for kind, number in per_prompt.items() if kind in kinds}
    if family.alone is not None and family.alone in kinds and limits.setdefault(family.alone, 1) > 1:
        given = f"--limit-mm-per-prompt {family.alone}={limits[family.alone]}"
        raise ConfigError(f"{given}: this model takes one {family.alone} per prompt")
    return limits


def _unsplit_tokens(family: MMFamily, most: Mapping[str, int], limits: Mapping[str, int], longest: int) -> int:
    """The most tokens that must be computed in one step: of one input, or of all inputs of a prompt that are joint.

    Without a limit, prompts with more than one joint input are taken as far as steps have room for them.
    """
    kinds = [kind for kind in family.bidirectional if most.get(kind)]
    if not family.joint:
        return max((most[kind] for kind in kinds), default=0)
    return min(longest, max((most[kind] * limits.get(kind, 1) for kind in kinds), default=0))


def _encoder_workspace(hf_config: Any, tokens: int, itemsize: int) -> int:
    """Bytes that the tower needs for an input of that many tokens: its inputs to all layers, of which most families
    select one afterwards (Qwen-VL doesn't), and what the widest layer computes."""
    largest = 0
    for name in _TOWERS:
        tower = getattr(hf_config, name, None)
        if tower is None:
            continue
        # Qwen2-VL's hidden_size is that of the decoder.
        hidden = _first(tower, "embed_dim", "hidden_size", "d_model") or 0
        inner = _first(tower, "intermediate_size", "encoder_ffn_dim") or int(hidden * getattr(tower, "mlp_ratio", 4))
        layers = _first(tower, "num_hidden_layers", "depth", "encoder_layers") or 1
        layers = 1 if hasattr(tower, "spatial_merge_size") else layers
        positions = tokens * _positions_per_token(hf_config, tower, name)
        numbers = positions * (layers * hidden + 8 * hidden + 2 * inner)
        if tower.model_type == "pixtral":
            numbers += 2 * positions * positions  # its mask over all pairs of patches, and a copy
        largest = max(largest, numbers * itemsize)
    return largest


def _positions_per_token(hf_config: Any, tower: Any, name: str) -> int:
    """How many positions of the tower become one token, at most."""
    if hf_config.model_type in CROPPED:
        return CROPPED_POSITIONS_PER_TOKEN
    if name == "audio_config":
        return AUDIO_POSITIONS_PER_TOKEN
    merge = getattr(hf_config, "spatial_merge_size", None) or getattr(tower, "spatial_merge_size", None)
    merge = merge or getattr(hf_config, "scale_factor", None)
    if merge:
        return int(merge) ** 2
    ratio = getattr(hf_config, "downsample_ratio", None)
    if ratio:
        return round(1 / ratio) ** 2
    tokens = getattr(hf_config, "mm_tokens_per_image", None)
    if tokens:
        return max(1, (tower.image_size // tower.patch_size) ** 2 // tokens)
    return 1


def _first(config: Any, *names: str) -> int | None:
    """The first of some fields that a config has."""
    return next((int(value) for name in names if (value := getattr(config, name, None))), None)
