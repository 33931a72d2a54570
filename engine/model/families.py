"""What each model family needs beyond its class in transformers; the parity suite covers all of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Family:
    """One `model_type`.

    Args:
        fused: its decoder can run in the C++ kernels.
        tp_plan: how ranks divide it, in place of the plan of its class: path within the base model, with * for a
            layer's number, and style (listed in `sharding/tp_plan.py`).
        transposed: its linears hold [inputs, outputs].
        heads_in_config: its attention reads the number of heads from the config only.
        all_layers_windowed: a config with a window but without layer types means that all layers have the window.
    """

    fused: bool = False
    tp_plan: Mapping[str, str] = field(default_factory=dict)
    transposed: bool = False
    heads_in_config: bool = False
    all_layers_windowed: bool = False


_ATTENTION = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
_MLP = {"layers.*.mlp.gate_proj": "colwise", "layers.*.mlp.up_proj": "colwise", "layers.*.mlp.down_proj": "rowwise"}
_GATE_UP = {"layers.*.mlp.gate_up_proj": "gate_up", "layers.*.mlp.down_proj": "rowwise"}
_EXPERTS = {
    "layers.*.mlp.experts": "moe_tp_experts",
    "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "layers.*.mlp.experts.down_proj": "rowwise",
}

GPT2 = Family(
    tp_plan={
        "h.*.attn.c_attn": "qkv",
        "h.*.attn.c_proj": "rowwise",
        "h.*.mlp.c_fc": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    },
    transposed=True,
)

OPT = Family(
    tp_plan={
        "decoder.layers.*.self_attn.q_proj": "colwise",
        "decoder.layers.*.self_attn.k_proj": "colwise",
        "decoder.layers.*.self_attn.v_proj": "colwise",
        "decoder.layers.*.self_attn.out_proj": "rowwise",
        "decoder.layers.*.fc1": "colwise",
        "decoder.layers.*.fc2": "rowwise",
    }
)

# Gate and up of its experts are interleaved, so that equal slices hold whole pairs.
GPT_OSS = Family(
    tp_plan={
        **_ATTENTION,
        "layers.*.self_attn.sinks": "cut 0",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.experts.gate_up_proj": "cut -1",
        "layers.*.mlp.experts.gate_up_proj_bias": "cut -1",
        "layers.*.mlp.experts.down_proj": "cut -2",
        "layers.*.mlp.experts.down_proj_bias": "first rank",
    }
)

# Keys and values are expanded to all heads before they are cached.
DEEPSEEK_V3 = Family(
    tp_plan={
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.q_b_proj": "colwise",
        "layers.*.self_attn.kv_b_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        **_MLP,
        **_EXPERTS,
    }
)

PHI3 = Family(
    tp_plan={"layers.*.self_attn.qkv_proj": "qkv", "layers.*.self_attn.o_proj": "rowwise", **_GATE_UP},
    heads_in_config=True,
    all_layers_windowed=True,
)

# Queries and keys are normalized over all heads: each rank has the weights of its heads, the mean is over all ranks.
OLMO = Family(tp_plan={**_ATTENTION, "layers.*.self_attn.q_norm": "norm", "layers.*.self_attn.k_norm": "norm", **_MLP})

# Model types that the parity suite compares with transformers' generate().
FAMILIES: dict[str, Family] = {
    "cohere2": Family(),
    "deepseek_v3": DEEPSEEK_V3,
    "exaone4": Family(),
    "gemma2": Family(),
    "gemma3_text": Family(),
    "glm4": Family(tp_plan={**_ATTENTION, **_GATE_UP}),
    "gpt2": GPT2,
    "gpt_neox": Family(),
    "gpt_oss": GPT_OSS,
    "granite": Family(),
    "llama": Family(fused=True),
    "ministral": Family(),
    "ministral3": Family(all_layers_windowed=True),
    "mistral": Family(fused=True, all_layers_windowed=True),
    "mixtral": Family(all_layers_windowed=True),
    "olmo2": OLMO,
    "olmo3": OLMO,
    "opt": OPT,
    "phi3": PHI3,
    "qwen2": Family(fused=True),
    "qwen2_moe": Family(),
    "qwen3": Family(fused=True),
    "qwen3_moe": Family(),
    "smollm3": Family(fused=True),
    "stablelm": Family(tp_plan={**_ATTENTION, **_MLP}),
    "starcoder2": Family(all_layers_windowed=True),
}

# Decoders that exist only in models with encoders (`engine.multimodal.families`).
DECODERS_WITH_ENCODERS: dict[str, Family] = {
    "molmo2_text": Family(tp_plan={**_ATTENTION, **_MLP}),
    "qwen2_5_vl_text": Family(fused=True),
    "qwen2_vl_text": Family(fused=True),
    "qwen3_vl_text": Family(fused=True, tp_plan={**_ATTENTION, **_MLP}),
}

# Types whose tokens attend in both directions: they run as transformers' class, and return embeddings or scores. The
# embedding suite compares all of them with transformers.
ENCODERS = frozenset(
    {
        "albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta",
        "xlm-roberta",
    }
)  # fmt: skip
# Of them, those whose first position is the one after the id of the padding.
AFTER_PADDING = frozenset({"camembert", "mpnet", "roberta", "xlm-roberta"})


def is_encoder(hf_config: Any) -> bool:
    """Whether a model, by its config, is an encoder."""
    return hf_config.model_type in ENCODERS


def lost_positions(hf_config: Any) -> int:
    """How many of an encoder's positions no token has."""
    return hf_config.pad_token_id + 1 if hf_config.model_type in AFTER_PADDING else 0


def family_of(model_type: str) -> Family | None:
    """What is known of a decoder, by the `model_type` of its config; None outside the parity suite."""
    return FAMILIES.get(model_type) or DECODERS_WITH_ENCODERS.get(model_type)
