"""What each kind of model does otherwise than its class in transformers tells; the parity suite holds all of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Family:
    """One `model_type`.

    fused: its decoder can run as the CPU's fused stack in C++.
    ranks: how ranks divide it, in place of the plan of its class (see `engine.model.split`): paths within the base
    model, with * for a layer's number.
    transposed: its linears hold [inputs, outputs].
    heads_in_config: its attention counts heads by the config alone.
    slides: where its config names a window and no kinds of layers, all of them have it.
    """

    fused: bool = False
    ranks: Mapping[str, str] = field(default_factory=dict)
    transposed: bool = False
    heads_in_config: bool = False
    slides: bool = False


_ATTENTION = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
_MLP = {
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
_GATE_UP = {"layers.*.mlp.gate_up_proj": "gate_up", "layers.*.mlp.down_proj": "rowwise"}
_EXPERTS = {
    "layers.*.mlp.experts": "moe_tp_experts",
    "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "layers.*.mlp.experts.down_proj": "rowwise",
}

GPT2 = Family(
    ranks={
        "h.*.attn.c_attn": "qkv",
        "h.*.attn.c_proj": "rowwise",
        "h.*.mlp.c_fc": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    },
    transposed=True,
)

OPT = Family(
    ranks={
        "decoder.layers.*.self_attn.q_proj": "colwise",
        "decoder.layers.*.self_attn.k_proj": "colwise",
        "decoder.layers.*.self_attn.v_proj": "colwise",
        "decoder.layers.*.self_attn.out_proj": "rowwise",
        "decoder.layers.*.fc1": "colwise",
        "decoder.layers.*.fc2": "rowwise",
    }
)

# Gates and ups of its experts lie in turns: any even piece of them is whole.
GPT_OSS = Family(
    ranks={
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
    ranks={
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
    ranks={"layers.*.self_attn.qkv_proj": "qkv", "layers.*.self_attn.o_proj": "rowwise", **_GATE_UP},
    heads_in_config=True,
    slides=True,
)

# Queries and keys are normalised over all heads: each rank has its heads' part of the norm, the mean is over all ranks.
OLMO = Family(
    ranks={
        **_ATTENTION,
        "layers.*.self_attn.q_norm": "norm",
        "layers.*.self_attn.k_norm": "norm",
        **_MLP,
    }
)

# Kinds of model that the parity suite holds against transformers' generate().
FAMILIES: dict[str, Family] = {
    "cohere2": Family(),
    "deepseek_v3": DEEPSEEK_V3,
    "exaone4": Family(),
    "gemma2": Family(),
    "gemma3_text": Family(),
    "glm4": Family(ranks={**_ATTENTION, **_GATE_UP}),
    "gpt2": GPT2,
    "gpt_neox": Family(),
    "gpt_oss": GPT_OSS,
    "granite": Family(),
    "llama": Family(fused=True),
    "ministral": Family(),
    "ministral3": Family(slides=True),
    "mistral": Family(fused=True, slides=True),
    "mixtral": Family(slides=True),
    "olmo2": OLMO,
    "olmo3": OLMO,
    "opt": OPT,
    "phi3": PHI3,
    "qwen2": Family(fused=True),
    "qwen2_moe": Family(),
    "qwen3": Family(fused=True),
    "qwen3_moe": Family(),
    "smollm3": Family(fused=True),
    "stablelm": Family(ranks={**_ATTENTION, **_MLP}),
    "starcoder2": Family(slides=True),
}
