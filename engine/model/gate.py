"""Says which models the one model path can't run, and why, before anything is loaded."""

from typing import Any

from engine.model.families import FAMILIES
from engine.model.quantised import refusal as quantised_refusal
from engine.model.quantised import settings_of

ATTENTION_KINDS = {"full_attention", "sliding_attention"}
ROPE_KINDS = {"default", "linear", "llama3", "longrope", "yarn", "proportional"}

# Classes whose forward pass needs more than the attention interface passes on.
REFUSED = {
    "falcon": "adds its attention mask by itself",
    "bloom": "uses ALiBi, which isn't supported",
    "mpt": "uses ALiBi, which isn't supported",
    "llama4_text": "attends in chunks, which isn't supported",
    "gemma3n_text": "needs embeddings per layer, which aren't supported",
    "gemma4_text": "has layers that share keys and values, which isn't supported",
}


def refusal(config: Any) -> str | None:
    """Why a transformers config can't be served, as the end of a sentence about the model; None if it can."""
    kind = config.model_type
    if kind in REFUSED:
        return f"it {REFUSED[kind]}"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder; only decoders are supported"
    if any(getattr(config, part, None) is not None for part in ("vision_config", "audio_config")):
        return "it takes images or audio, which aren't supported yet"
    quantised = settings_of(config)
    if quantised is not None and (reason := quantised_refusal(quantised)):
        return reason
    if getattr(config, "kv_lora_rank", None) and kind not in FAMILIES:
        return "it uses multi-head latent attention, which isn't supported"
    others = set(getattr(config, "layer_types", None) or ()) - ATTENTION_KINDS
    if others:
        return f"it has layers of kind {', '.join(sorted(others))}; only full and sliding attention are supported"
    return _rope_refusal(config) or _class_refusal(config)


def _rope_refusal(config: Any) -> str | None:
    rope = getattr(config, "rope_parameters", None) or {}
    each = rope.values() if rope and all(isinstance(value, dict) for value in rope.values()) else [rope]
    kinds = {parameters.get("rope_type", "default") for parameters in each if parameters}
    unknown = kinds - ROPE_KINDS
    if unknown:
        return f"its rotary embedding is of kind {', '.join(sorted(unknown))}, which isn't supported"
    return None


def _class_refusal(config: Any) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"transformers knows no causal language model of kind {config.model_type!r}"
    return None
