"""Finds out from the config whether a model is supported, before anything is loaded."""

from typing import Any

from engine.model.checkpoints.quantized import quantization_config, unsupported_quantization
from engine.model.families import FAMILIES, family_of, is_encoder
from engine.multimodal.families import MM_FAMILIES

ATTENTION_TYPES = {"full_attention", "sliding_attention"}
ROPE_TYPES = {"default", "linear", "llama3", "longrope", "yarn", "proportional"}

# Classes whose forward pass needs more than the attention interface passes on.
UNSUPPORTED_TYPES = {
    "falcon": "builds its own attention mask, which isn't supported",
    "bloom": "uses ALiBi, which isn't supported",
    "mpt": "uses ALiBi, which isn't supported",
    "llama4_text": "attends in chunks, which isn't supported",
    "gemma3n_text": "needs embeddings per layer, which aren't supported",
    "gemma4_text": "has layers that share keys and values, which isn't supported",
}


def unsupported_reason(hf_config: Any) -> str | None:
    """Why a model can't be served, as the end of a sentence about it; None if it can."""
    if hf_config.model_type in MM_FAMILIES:
        return _unsupported_decoder(hf_config.get_text_config(decoder=True), hf_config)
    if is_encoder(hf_config):
        return _unsupported_decoder(hf_config, hf_config)
    return _unsupported_decoder(hf_config, hf_config) or _unsupported_class(hf_config)


def _unsupported_decoder(text_config: Any, hf_config: Any) -> str | None:
    """Why a decoder can't be served; `hf_config` is that of the whole model."""
    model_type = text_config.model_type
    if model_type in UNSUPPORTED_TYPES:
        return f"it {UNSUPPORTED_TYPES[model_type]}"
    if getattr(text_config, "is_encoder_decoder", False):
        return "it is an encoder-decoder; only decoders are supported"
    if any(getattr(text_config, part, None) is not None for part in ("vision_config", "audio_config")):
        return (
            f"it takes images or audio, which aren't supported for models of type {model_type!r}; they are for "
            f"{', '.join(sorted(MM_FAMILIES))}"
        )
    quantization = quantization_config(hf_config)
    if quantization is not None and (reason := unsupported_quantization(quantization)):
        return reason
    if getattr(text_config, "kv_lora_rank", None) and family_of(model_type) is None:
        return "it uses multi-head latent attention, which isn't supported"
    others = set(getattr(text_config, "layer_types", None) or ()) - ATTENTION_TYPES
    if others:
        return f"it has layers of type {', '.join(sorted(others))}; only full and sliding attention are supported"
    return _unsupported_rope(text_config)


def _unsupported_rope(hf_config: Any) -> str | None:
    rope = getattr(hf_config, "rope_parameters", None) or {}
    each = rope.values() if rope and all(isinstance(value, dict) for value in rope.values()) else [rope]
    rope_types = {parameters.get("rope_type", "default") for parameters in each if parameters}
    unknown = rope_types - ROPE_TYPES
    if unknown:
        return f"its rotary embedding is of type {', '.join(sorted(unknown))}, which isn't supported"
    return None


def _unsupported_class(hf_config: Any) -> str | None:
    if hf_config.model_type in FAMILIES:  # known to have one: the import takes seconds
        return None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if hf_config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"transformers has no causal language model of type {hf_config.model_type!r}"
    return None
