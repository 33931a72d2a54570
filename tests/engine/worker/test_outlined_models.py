"""Models whose class was never imported give the same bits as those that were built from the class."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.kernels.cpu import build
from engine.messages import Sampling
from engine.model.loading.meta_model import MetaModel
from engine.model.loading.outline import PARTS, open_outline
from engine.worker import backend_builder
from tests.engine.worker.driver import VOCAB, Driver, Request, build_model
from tests.engine.worker.parity import prompts

MakeDriver = Callable[..., Driver]

SIZES = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# By name: model type, changes of its config, options of the engine.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "biases": ("llama", {"attention_bias": True, "rope_parameters": LLAMA3}, {}),
    "yarn": ("llama", {}, {"dtype": "bfloat16"}),
    "tied, int4": ("llama", {"tie_word_embeddings": True, "rope_parameters": DEFAULT}, {"quantization": "int4"}),
    "window in all layers": ("mistral", {"rope_parameters": DEFAULT}, {"dtype": "bfloat16"}),
    "window in some layers": ("qwen2", {"tie_word_embeddings": True}, {}),
    "norms of heads, int8": ("qwen3", {"rope_parameters": DEFAULT}, {"quantization": "int8"}),
    "layers that do not rotate": ("smollm3", {"no_rope_layers": [1, 0, 1]}, {"dtype": "bfloat16"}),
}


def logprobs(driver: Driver) -> list[list[dict[int, float]]]:
    requests = [Request(prompt, Sampling(logprobs=VOCAB)) for prompt in prompts(1)]
    driver.run(requests, 4, seed=3)
    return [request.logprobs for request in requests]


@pytest.mark.skipif(not build.supported_isas(), reason="the CPU kernels need AVX2 or NEON")
@pytest.mark.parametrize("case", sorted(CASES))
def test_the_bits_are_those_of_the_class(
    case: str, tmp_path: Path, make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, changes, options = CASES[case]
    build_model(kind, tmp_path, **{**SIZES, **changes})
    options = {"block_size": 16, **({"dtype": "bfloat16"} if "quantization" in options else {}), **options}
    outlines: list[MetaModel | None] = []

    def opened(*arguments: Any) -> MetaModel | None:
        outlines.append(open_outline(*arguments))
        return outlines[-1]

    monkeypatch.setattr(backend_builder, "open_outline", opened)
    driver = make_driver(tmp_path, **options)
    assert "fused stack" in driver.executor.kernels
    found = logprobs(driver)
    assert isinstance(outlines[-1], MetaModel), "the outline was used"
    monkeypatch.setattr(backend_builder, "open_outline", lambda *_: None)
    assert found == logprobs(make_driver(tmp_path, **options))


def test_each_type_with_an_outline_has_a_case() -> None:
    assert {kind for kind, _, _ in CASES.values()} == PARTS.keys()
