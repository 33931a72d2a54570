"""An engine on simulated hardware is planned without weights; what doesn't fit is refused with what would."""

from typing import Any

import pytest

from engine.config import AUTO_LENGTH, EngineConfig
from engine.engine_plan import EnginePlan, plan_engine
from engine.errors import ConfigError, OutOfMemoryError

LLAMA_70B = "meta-llama/Llama-3.3-70B-Instruct"


def plan(model: str, device: str = "sim:h100", **options: Any) -> EnginePlan:
    return plan_engine(EngineConfig(model=model, device=device, **options))


def test_the_cache_is_what_weights_and_workspace_leave() -> None:
    found = plan("meta-llama/Meta-Llama-3.1-8B-Instruct")
    lines = {line.what: line.bytes for line in found.resolution.memory}
    resolved = found.resolution.config
    assert (resolved.max_num_seqs, resolved.max_num_batched_tokens, resolved.block_size) == (1024, 8192, 16)
    assert lines["weights"] == pytest.approx(16.06e9, rel=0.001)
    assert lines["KV cache"] == resolved.num_blocks * 16 * 131072
    assert 0 <= 0.9 * 84.9e9 - sum(lines.values()) < 16 * 131072


def test_ranks_and_fp8_leave_more() -> None:
    blocks = [
        plan(LLAMA_70B, **options).resolution.config.num_blocks
        for options in (
            {"tensor_parallel_size": 4},
            {"tensor_parallel_size": 4, "quantization": "fp8"},
            {"tensor_parallel_size": 4, "quantization": "fp8", "kv_cache_dtype": "fp8"},
            {"tensor_parallel_size": 8, "quantization": "fp8", "kv_cache_dtype": "fp8"},
        )
    ]
    assert blocks == sorted(blocks)


def test_a_length_that_fits() -> None:
    found = plan("pixtral-12b", max_model_len=AUTO_LENGTH)
    assert 100_000 < found.config.max_model_len < 1_024_000  # type: ignore[operator]


def test_too_large_a_model_names_what_holds_it() -> None:
    with pytest.raises(OutOfMemoryError, match=r"--tp 2 or --device sim:b200$"):
        plan(LLAMA_70B, max_model_len=8192)
    with pytest.raises(OutOfMemoryError, match=r"--max-model-len \d+, or --device sim:b200$"):
        plan(LLAMA_70B, tensor_parallel_size=8, device="sim:h200", max_model_len=131072, gpu_memory_utilization=0.15)


def test_ranks_without_times() -> None:
    with pytest.raises(ConfigError, match=r"--tp 16: .* 1, 2, 4, 8 ranks"):
        plan(LLAMA_70B, tensor_parallel_size=16)
