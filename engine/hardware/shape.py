"""The shape of a model as the latency model sees it."""

from engine.config import EngineConfig
from engine.hardware.step_time import DecoderShape
from engine.model.model_info import ModelInfo


def decoder_shape(config: EngineConfig, model_info: ModelInfo) -> DecoderShape:
    """The whole decoder of a model, with the dtypes of its products and of its KV cache."""
    fp8 = model_info.stored_fp8 or config.quantization == "fp8"
    return DecoderShape(
        num_layers=model_info.num_layers,
        hidden_size=model_info.hidden_size,
        intermediate_size=model_info.intermediate_size,
        num_heads=model_info.num_heads,
        num_kv_heads=model_info.num_kv_heads,
        head_dim=model_info.head_dim,
        vocab_size=model_info.vocab_size,
        gemm_dtype="fp8" if fp8 else "bf16",
        kv_dtype="fp8" if config.kv_cache_dtype == "fp8" else "bf16",
    )
