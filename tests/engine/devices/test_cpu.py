"""What the CPU's features decide."""

from typing import Any

import pytest

from engine.devices import cpu
from engine.devices.cpu import encoder_dtype, pytorch_warnings
from engine.memory import resolve
from engine.model.mm_facts import MMFacts
from engine.multimodal.types import MMSpec
from tests.engine.devices.test_machines import configure
from tests.engine.test_memory import GIB, make_facts


@pytest.mark.parametrize(
    ("features", "dtype", "expected"),
    [
        ({"avx2"}, "bfloat16", "float32"),
        ({"avx2"}, "float16", "float32"),
        ({"avx2"}, "float32", "float32"),
        ({"avx512_bf16"}, "bfloat16", "bfloat16"),
        ({"avx512_bf16"}, "float16", "float32"),
        (None, "bfloat16", "bfloat16"),  # not known: as the model
    ],
)
def test_encoders_are_computed_in_what_the_cpu_computes_fast(
    features: set[str] | None, dtype: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_features", lambda: features)
    assert encoder_dtype(dtype) == expected
    assert bool(pytorch_warnings(dtype)) == (expected != dtype)


@pytest.mark.parametrize(
    ("facts", "options", "budget", "source"),
    [
        ({"weight_bytes": 2 * 135_000_000}, {}, 384, "at most 150 ms on AMX tiles"),
        ({"weight_bytes": 2 * 50_000_000}, {}, 512, "at most 150 ms on AMX tiles"),
        ({"weight_bytes": 2 * 1_700_000_000}, {}, 112, "default"),
        (
            {"weight_bytes": int(135_000_000 * (1 + 2 / 64))},
            {"quantization": "int8"},
            384,
            "at most 150 ms on AMX tiles",
        ),
        ({"weight_bytes": 4 * 135_000_000, "dtype": "float32"}, {}, 112, "default"),
        ({}, {"max_num_batched_tokens": 200}, 200, ""),
        ({}, {"max_num_seqs": 600}, 616, "one for each request, and 16 of prompts"),
        ({}, {"kernels": "avx512-bf16"}, 112, "default"),
        ({}, {"kernels": "torch"}, 112, "default"),
    ],
)
def test_steps_on_tiles_compute_as_many_tokens_as_take_150_ms(
    facts: dict[str, Any], options: dict[str, Any], budget: int, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu.build, "supported_isas", lambda: ["amx", "avx512-bf16"])
    monkeypatch.setattr(cpu, "cores", lambda: 2)
    given = {"weight_bytes": 2 * 135_000_000, "dtype": "bfloat16", **facts}
    found = resolve(configure(**options), make_facts(**given), 64 * GIB)
    assert (found.config.max_num_batched_tokens, found.budget_source) == (budget, source)


def test_the_memory_table_has_the_wider_weights_of_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    mm = MMFacts(MMSpec("llava", {"image": 10}, {"image": 64}), frozenset({10}), 100, 5000, encoder_parameters=7000)
    lines = {}
    for features in ({"avx2"}, {"avx512_bf16"}):
        monkeypatch.setattr(cpu, "_features", lambda found=features: found)
        found = resolve(configure(), make_facts(dtype="bfloat16", mm=mm), 4 * GIB)
        lines[min(features)] = {line.what: line.bytes for line in found.memory}
    assert lines["avx2"]["encoder in float32"] == 2 * 7000
    assert lines["avx2"]["encoder workspace"] == 2 * 5000
    assert lines["avx512_bf16"]["encoder workspace"] == 5000
    assert "encoder in float32" not in lines["avx512_bf16"]
