"""Molmo's first generation, against a plain forward pass of the published code's arithmetic."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.multimodal.types import Processed
from tests.engine.model.molmo.molmo_checkpoint import CONFIG, NORM_AFTER, PlainMolmo, config_of, write_checkpoint
from tests.engine.worker.driver import VOCAB
from tests.engine.worker.mm_model import MMModel

VISION = CONFIG["vision_config"] | {"image_size": 24}
MOLMO = {"vocab_size": VOCAB, "embedding_size": VOCAB, "vision_config": VISION}


def picture(number: int) -> Image.Image:
    """Each number is another picture; 1 and 2 have the same size, so that they can be exchanged."""
    width, height = ((40, 26), (25, 60))[(number + 1) // 2 % 2]
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8))


class Reference:
    """`PlainMolmo` as the parity suite calls a class of transformers."""

    def __init__(self, plain: PlainMolmo):
        self._plain = plain

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, images: list[Any], **_: Any) -> torch.Tensor:
        prompt = input_ids[0].tolist()
        return torch.tensor([prompt + self._plain.greedy(prompt, images, max_new_tokens)])

    def __call__(self, input_ids: torch.Tensor, images: list[Any], **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self._plain.logits(input_ids[0].tolist(), images)[None])


def build(folder: Path, changes: dict[str, Any]) -> Reference:
    config = config_of(**MOLMO, **changes)
    weights = write_checkpoint(folder, config, seed=3)
    options = {"max_crops": 2, "overlap_margins": [2, 2]}
    (folder / "preprocessor_config.json").write_text(json.dumps(options))
    return Reference(PlainMolmo(config, weights))


def image_tensors(ids: torch.Tensor, processed: list[Processed]) -> dict[str, Any]:
    del ids
    each = [{name: torch.from_numpy(np.asarray(value)) for name, value in one.tensors.items()} for one in processed]
    return {"images": each}


MODELS = {
    "molmo": MMModel(lambda folder: build(folder, {}), image_tensors, picture),
    "molmo/norm-after": MMModel(lambda folder: build(folder, NORM_AFTER), image_tensors, picture),
}
