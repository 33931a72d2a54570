"""What the CPU's features decide."""

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
