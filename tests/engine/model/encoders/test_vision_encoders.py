"""Encoders of models that take images of many sizes, against transformers' classes and their check of placeholders."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.model.encoders import qwen2_vl
from engine.model.encoders.base import EncodedInput
from engine.multimodal.families import MM_FAMILIES, embedding_ids
from engine.multimodal.types import MediaKind, Processed, Video
from tests.engine.multimodal.tiny_vision import CONFIGS, picture, tiny_model, write_model

SIZES = [(1, 1), (1, 100), (16, 16), (90, 33), (33, 90), (200, 160)]


def processed(folder: Path, model: Any, media: Any, kind: MediaKind = "image") -> Processed:
    model_type = model.config.model_type
    sizes = {"min_pixels": 64, "max_pixels": 6400} if model_type.startswith("qwen") else {}
    module = importlib.import_module(f"engine.multimodal.processors.{MM_FAMILIES[model_type].processor}")
    found: Processed = module.make(write_model(folder, model_type), model.config).process(kind, media, 1, sizes)
    return found


def encoded(model: Any, inputs: Processed) -> EncodedInput:
    encoder = importlib.import_module(f"engine.model.encoders.{MM_FAMILIES[model.config.model_type].encoder}")
    with torch.inference_mode():
        found: EncodedInput = encoder.make(model).encode(as_tensors(inputs))
    return found


def as_tensors(inputs: Processed) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.tensors.items()}


def class_features(model: Any, inputs: Processed, kind: str = "image") -> Any:
    """What the class's own method returns for one image or video."""
    tensors = as_tensors(inputs)
    if "grid_thw" in tensors:
        call = model.get_image_features if kind == "image" else model.get_video_features
        return call(tensors["pixel_values"], tensors["grid_thw"])
    if model.config.model_type in ("idefics3", "smolvlm"):
        tensors = {"pixel_values": tensors["pixel_values"][None]}
    return model.get_image_features(**tensors)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_as_the_class(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(model_type)
    ids = embedding_ids(MM_FAMILIES[model_type], model.config)
    for width, height in SIZES:
        inputs = processed(tmp_path, model, picture(width, height))
        found = encoded(model, inputs)
        with torch.inference_mode():
            expected = class_features(model, inputs)
        features = torch.cat([one.reshape(-1, one.shape[-1]) for one in expected.pooler_output])
        torch.testing.assert_close(found.embeddings, features, rtol=0, atol=1e-6)
        assert found.embeddings.abs().max() > 0
        assert len(found.embeddings) == sum(token in ids for token in inputs.tokens)
        if model_type != "idefics3":  # this class has no check of its own
            text = torch.zeros(1, len(inputs.tokens), 32)
            rows = found.embeddings if model_type.startswith(("qwen", "smolvlm")) else found.embeddings[None]
            mask = model.model.get_placeholder_mask(torch.tensor([inputs.tokens]), text, image_features=rows)
            assert int((mask[0] if isinstance(mask, tuple) else mask).sum()) == len(found.embeddings)
        if MM_FAMILIES[model_type].deepstack:
            layers = torch.stack([torch.cat(layer) for layer in expected.deepstack_features])
            assert found.deepstack is not None
            torch.testing.assert_close(found.deepstack, layers, rtol=0, atol=1e-6)
        else:
            assert found.deepstack is None


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_videos(tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(model_type)
    frames = np.random.default_rng(0).integers(0, 256, (5, 30, 40, 3), dtype=np.uint8)
    inputs = processed(tmp_path, model, Video(frames, np.arange(5) * 0.5), "video")
    found = encoded(model, inputs)
    with torch.inference_mode():
        expected = class_features(model, inputs, "video")
    torch.testing.assert_close(found.embeddings, torch.cat(list(expected.pooler_output)), rtol=0, atol=1e-6)
    assert len(found.embeddings) == inputs.tokens.count(model.config.video_token_id) > 0
    if found.deepstack is not None:
        assert found.deepstack.shape == (2, *found.embeddings.shape)
    # Frame by frame, as videos of more patches.
    monkeypatch.setattr(qwen2_vl, "PATCHES_AT_ONCE", 1)
    parts = encoded(model, inputs)
    torch.testing.assert_close(parts.embeddings, found.embeddings, rtol=0, atol=1e-5)
    torch.testing.assert_close(parts.deepstack, found.deepstack, rtol=0, atol=1e-5)


def test_a_black_tile_is_not_dropped(tmp_path: Path) -> None:
    """transformers' SmolVLM takes tiles of zeros for padding, which black pictures are without normalization."""
    model = tiny_model("smolvlm")
    inputs = processed(tmp_path, model, picture(33, 33))
    black = Processed(inputs.tokens, {"pixel_values": np.zeros_like(inputs.tensors["pixel_values"])})
    assert len(encoded(model, black).embeddings) == inputs.tokens.count(256)
