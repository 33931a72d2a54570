"""Pictures of any shape: refused by the processor, or encoded to one embedding for each token that stands for one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from engine.errors import RequestError
from engine.messages import MMInputRef
from tests.engine.worker.mm_driver import Prompts, start
from tests.engine.worker.mm_models import MM_MODELS

SHAPES = ((1, 1), (1, 300), (300, 1), (2, 3), (27, 29), (28, 28), (200, 30), (31, 190))
OTHER_DECODERS = {"molmo/norm-after", "molmo2/olmo"}  # whose processors and towers are those of another variant
IMAGES = sorted({kind for kind, entry in MM_MODELS.items() if entry.kind == "image"} - OTHER_DECODERS)


@pytest.mark.parametrize("kind", IMAGES)
def test_pictures_of_any_shape(kind: str, tmp_path: Path) -> None:
    entry = MM_MODELS[kind]
    entry.build(tmp_path)
    prompts, driver = Prompts(tmp_path, entry), start(tmp_path)
    try:
        runner: Any = driver.executor._runner
        cache, ids = runner._slots.encoder_cache, runner._slots._tokens_of_inputs.embedding_ids
        most, taken = prompts._processor.most_tokens("image", {}), 0
        for width, height in SHAPES:
            pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
            for count in (1, 3):
                try:
                    processed = prompts._processor.process("image", Image.fromarray(pixels), count, {})
                except RequestError:
                    continue
                assert len(processed.tokens) <= most, (width, height, count)
                save_file(dict(processed.tensors), tmp_path / "features")
                ref = MMInputRef(b"key", 0, len(processed.tokens), features=str(tmp_path / "features"))
                with torch.inference_mode():
                    cache.encode(ref, int(np.isin(processed.tokens, ids).sum()))
                assert cache[b"key"].embeddings.isfinite().all()
                taken += 1
        assert taken >= len(SHAPES)
    finally:
        driver.executor.shutdown()
