"""The encoder of a worker, in another dtype than the decoder."""

import importlib
from pathlib import Path

import pytest
import torch
from safetensors.numpy import save_file

from engine.messages import MMInputRef
from engine.model.composed_decoder import decoder_of, outer_modules
from engine.multimodal.families import MM_FAMILIES, embedding_ids
from engine.worker.mm_start import encoder_cache
from tests.engine.worker.mm_models import MM_MODELS

KINDS = ["llava", "qwen2_audio"]


def written_input(kind: str, model: object, folder: Path) -> tuple[MMInputRef, int]:
    """The features of a sample input as a file, and the number of its embeddings."""
    config, made = model.config, MM_MODELS[kind]  # type: ignore[attr-defined]
    family = MM_FAMILIES[config.model_type]
    processor = importlib.import_module(f"engine.multimodal.processors.{family.processor}").make(folder, config)
    found = processor.process(made.kind, made.media(1), 1, {})
    save_file(dict(found.tensors), folder / "features")
    count = sum(token in embedding_ids(family, config) for token in found.tokens)
    return MMInputRef(b"key", 0, len(found.tokens), features=str(folder / "features")), count


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_in_float32_beside_a_decoder_in_bfloat16(kind: str, tmp_path: Path) -> None:
    model = MM_MODELS[kind].build(tmp_path).eval().requires_grad_(False)
    ref, count = written_input(kind, model, tmp_path)
    with torch.inference_mode():
        exact = encoder_cache(model)
        exact.encode(ref, count)
        model.to(torch.bfloat16)
        cache = encoder_cache(model, dtype=torch.float32)
        cache.encode(ref, count)
    outside = [parameter for module in outer_modules(model) for parameter in module.parameters(recurse=False)]
    assert {parameter.dtype for parameter in outside} == {torch.float32}
    assert {parameter.dtype for parameter in decoder_of(model).parameters()} == {torch.bfloat16}
    expected, found = exact[b"key"].embeddings, cache[b"key"].embeddings
    assert found.dtype == torch.bfloat16
    # Only weights and results were rounded to bfloat16.
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()
