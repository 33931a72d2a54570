"""Says which models the one model path can't run, and why, before anything is loaded."""

from typing import Any

ATTENTION_KINDS = {"full_attention", "sliding_attention"}
ROPE_KINDS = {"default", "linear", "llama3", "yarn", "proportional"}

# Classes whose forward pass needs more than the attention interface passes on.
REFUSED = {
    "falcon": "adds its attention mask by itself",
    "bloom": "uses ALiBi, which isn't supported",
    "mpt": "uses ALiBi, which isn't supported",
    "llama4_text": "attends in chunks, which isn't supported",
    "gemma3n_text": "needs embeddings per layer, which aren't supported",
    "gemma4_text": "has layers that share keys and values, which isn't supported",
}

# Kinds whose decoder the CPU's fused stack in C++ computes.
FUSED = {"llama", "mistral", "qwen2", "qwen3", "smollm3"}

# Kinds of model that the parity suite holds against transformers' generate().
TESTED = {
    "cohere2",
    "exaone4",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "opt",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "stablelm",
    "starcoder2",
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
    if getattr(config, "quantization_config", None):
        return "its weights are quantised, which isn't supported yet"
    if getattr(config, "kv_lora_rank", None):
        return "it uses multi-head latent attention, which isn't supported"
    others = set(getattr(config, "layer_types", None) or ()) - ATTENTION_KINDS
    if others:
        return f"it has layers of kind {', '.join(sorted(others))}; only full and sliding attention are supported"
    return _rope_refusal(config) or _class_refusal(config)


def _rope_refusal(config: Any) -> str | None:
    rope = getattr(config, "rope_parameters", None) or {}
    each = rope.values() if rope and all(isinstance(value, dict) for value in rope.values()) else [rope]
    kinds = {parameters.get("rope_type", "default") for parameters in each if parameters}
    if "longrope" in kinds:
        # Which of the two factor lists holds depends on the longest position of the batch: fixed only if one is left.
        original = getattr(config, "original_max_position_embeddings", None)
        if original is not None and config.max_position_embeddings <= original:
            kinds.discard("longrope")
    unknown = kinds - ROPE_KINDS
    if unknown:
        return f"its rotary embedding is of kind {', '.join(sorted(unknown))}, which isn't supported"
    return None


def _class_refusal(config: Any) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"transformers knows no causal language model of kind {config.model_type!r}"
    return None
