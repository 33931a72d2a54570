"""Translates `vision_encoder` in params.json to the config of a transformers class with a Pixtral tower."""

from collections.abc import Mapping
from typing import Any

from engine.model.config.config_json import as_declared, check_size
from engine.multimodal.families import MISTRAL_IMAGES

SIZES = {
    "hidden_size": "hidden_size",
    "num_channels": "num_channels",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
}
THETA, CHANNELS = 1e4, 3  # defaults of Mistral's own code, and those of the ids
TOKEN_IDS = {"image_token_id": 10, "image_break_token_id": 12, "image_end_token_id": 13}
MERGE = "patch_merge"
LLAVA, MISTRAL3 = "llava", "mistral3"
CLASSES = {LLAVA: "LlavaForConditionalGeneration", MISTRAL3: "Mistral3ForConditionalGeneration"}


class UnsupportedError(Exception):
    """A reason, as the end of a sentence about the model."""


def with_vision(
    text: Mapping[str, Any], whole: Mapping[str, Any], vision: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The model type of the whole model, and the fields of its config.

    The generation of Mistral Small 3.1 normalizes the patches and merges neighboring ones before the projector.

    Args:
        text: fields of the decoder's config, model_type included.
        whole: fields of the whole model's config.
        vision: `vision_encoder` of params.json.
    """
    left = {key: value for key, value in vision.items() if value is not None}
    left.setdefault("image_size", left.get("max_image_size"))
    left.pop("max_image_size", None)  # of mistral-common's image encoder, which reads its own file
    left.setdefault("num_channels", CHANNELS)
    missing = [key for key in SIZES if left.get(key) is None]
    if missing:
        raise ValueError(f"vision_encoder lacks {', '.join(missing)}")
    tower: dict[str, Any] = {ours: _size(theirs, left.pop(theirs)) for theirs, ours in SIZES.items()}
    theta = as_declared("vision_encoder.rope_theta", left.pop("rope_theta", THETA), float)
    tower |= {
        "model_type": "pixtral",
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "axial", "rope_theta": theta},
    }
    ids = {key: as_declared(f"vision_encoder.{key}", left.pop(key, default), int) for key, default in TOKEN_IDS.items()}
    fields = {
        **whole,
        "text_config": dict(text),
        "vision_config": tower,
        "image_token_index": ids.pop("image_token_id"),
        **ids,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "multimodal_projector_bias": bool(left.pop("adapter_bias", True)),
        MISTRAL_IMAGES: True,
    }
    merge = _size("spatial_merge_size", left.pop("spatial_merge_size", 1))
    normalizes, projector = bool(left.pop("add_pre_mm_projector_layer_norm", False)), left.pop("mm_projector_id", "")
    if left:
        raise UnsupportedError(f"its vision_encoder has {', '.join(sorted(left))}, which isn't supported")
    if normalizes and projector == MERGE:
        return MISTRAL3, {**fields, "spatial_merge_size": merge}
    if normalizes or projector or merge != 1:
        raise UnsupportedError(
            "its vision_encoder has only some of add_pre_mm_projector_layer_norm, mm_projector_id 'patch_merge' and "
            "spatial_merge_size, which isn't supported"
        )
    return LLAVA, {**fields, "vision_feature_select_strategy": "full", "image_seq_length": 1}


def _size(name: str, value: Any) -> int:
    size: int = as_declared(f"vision_encoder.{name}", value, int)
    check_size(f"vision_encoder.{name}", size)
    return size
