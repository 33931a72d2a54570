"""The class of Molmo's first generation, loaded from checkpoints with the published names, against a plain forward."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.model.encoders import molmo as molmo_encoder
from engine.model.loading.open_model import open_model
from engine.model.model_info import read_model_info
from engine.multimodal.processors import molmo as molmo_processor
from tests.engine.model.molmo.molmo_checkpoint import (
    CONFIG,
    IMAGE,
    NORM_AFTER,
    PATCH,
    PlainMolmo,
    config_of,
    write_checkpoint,
)

TOLERANCE = 2e-5


def opened(folder: Path, **options: Any) -> Any:
    config = EngineConfig(model=str(folder), **options)
    meta_model = open_model(config, read_model_info(config))
    meta_model.fill()
    model = meta_model.model
    for part in (model.config, model.config.text_config):
        part._attn_implementation = "sdpa"
    return model


def images_of(model: Any, folder: Path, count: int) -> tuple[list[int], list[dict[str, Tensor]]]:
    """A prompt with images, and their tensors."""
    processor = molmo_processor.make(folder, model.config)
    tokens, tensors = [1], []
    for seed, (width, height) in zip(range(count), [(60, 70), (30, 90), (48, 48)], strict=False):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        found = processor.process("image", Image.fromarray(pixels), count, {"max_crops": 3})
        tokens += [*found.tokens, 2 + seed]
        tensors.append({name: torch.from_numpy(value) for name, value in found.tensors.items()})
    return [*tokens, 7, 8, 9], tensors


def joined(images: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Several images as the inputs of one call of the class."""
    cells = [len(one["images"]) * 36 for one in images]
    order = [one["image_order"] + sum(cells[:i]) for i, one in enumerate(images)]
    return {
        "images": torch.cat([one["images"] for one in images]),
        "image_masks": torch.cat([one["image_masks"] for one in images]),
        "image_order": torch.cat(order),
    }


@pytest.mark.parametrize("changes", [{}, NORM_AFTER])
def test_class_equals_the_plain_forward(changes: dict[str, Any], tmp_path: Path) -> None:
    """Logits of prompts with none, one and two images; greedy outputs through `generate()`."""
    config = config_of(**changes)
    plain = PlainMolmo(config, write_checkpoint(tmp_path, config))
    model = opened(tmp_path)
    for count in (0, 1, 2):
        tokens, images = images_of(model, tmp_path, count)
        inputs = joined(images) if images else {}
        ids = torch.tensor([tokens])
        with torch.no_grad():
            found = model(input_ids=ids, **inputs).logits[0]
        expected = plain.logits(tokens, images)
        assert (found - expected).abs().max() < TOLERANCE
        generated = model.generate(input_ids=ids, **inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert generated[0, len(tokens) :].tolist() == plain.greedy(tokens, images, 4)


def test_encoder_gives_what_is_added(tmp_path: Path) -> None:
    """Mutations of the prompt or of the images change the logits."""
    plain = PlainMolmo(CONFIG, write_checkpoint(tmp_path))
    model = opened(tmp_path)
    tokens, images = images_of(model, tmp_path, 2)
    encoder = molmo_encoder.make(model)
    parts = [encoder.encode(one).embeddings for one in images]
    assert [len(part) for part in parts] == [len(one["image_order"]) for one in images]
    for part, one in zip(parts, images, strict=True):
        assert (part - plain.features(one)).abs().max() < TOLERANCE
    expected = plain.logits(tokens, images)
    at = torch.tensor([token == PATCH for token in tokens])
    embedded = model.get_input_embeddings()(torch.tensor([tokens]))

    def difference(features: Tensor, keep: bool = True) -> float:
        inputs = embedded.clone()
        inputs[0, at] = features + (inputs[0, at] if keep else 0)
        return float((model(inputs_embeds=inputs).logits[0] - expected).abs().max())

    whole = torch.cat(parts)
    assert difference(whole) < TOLERANCE
    assert difference(whole.roll(1, 0)) > 100 * TOLERANCE
    assert difference(torch.cat(parts[::-1])) > 100 * TOLERANCE
    assert difference(whole, keep=False) > 100 * TOLERANCE


def test_padding_is_embedded(tmp_path: Path) -> None:
    """Patches without image, and those with some, have embeddings of their own."""
    model_of = PlainMolmo(CONFIG, write_checkpoint(tmp_path))
    model = opened(tmp_path)
    _, (one,) = images_of(model, tmp_path, 1)
    encoder = molmo_encoder.make(model)
    assert sorted(set(one["image_masks"].unique().tolist()) & {-1.0, 0.0, 1.0}) == [-1, 0, 1]
    found = [encoder.encode(one | {"image_masks": one["image_masks"].clone().fill_(value)}) for value in (0, 0.5, 1)]
    assert (found[0].embeddings - found[2].embeddings).abs().max() > 0.01
    assert (found[1].embeddings - found[2].embeddings).abs().max() > 0.01
    assert (found[0].embeddings - model_of.features(one | {"image_masks": torch.zeros(1)})).abs().max() < TOLERANCE


def test_new_tokens_have_embeddings_and_no_logits(tmp_path: Path) -> None:
    weights = write_checkpoint(tmp_path)
    model = opened(tmp_path)
    assert torch.equal(model.get_input_embeddings().weight[96:], weights["model.transformer.wte.new_embedding"])
    assert model.lm_head.weight.shape == (96, 32)
    assert (model.config.image_patch_token_id, model.config.image_token_id) == (PATCH, IMAGE)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layer_norm_type": "default"}, "layer_norm_type 'default' isn't supported"),
        ({"clip_qkv": 8.0}, "clip_qkv 8.0 isn't supported"),
        ({"weight_tying": True}, "weight_tying True isn't supported"),
        ({"attention_layer_norm": True}, "attention_layer_norm True isn't supported"),
        ({"qkv_bias": False}, "qkv_bias False isn't supported"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(**changes)))
    with pytest.raises(ModelError, match=says):
        read_model_info(EngineConfig(model=str(tmp_path), load_format="dummy"))


def test_checkpoint_that_lacks_a_part(tmp_path: Path) -> None:
    config = config_of(num_key_value_heads=4)
    write_checkpoint(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"att_proj.\w+ of shape .*the parameters in it have a length of 96"):
        opened(tmp_path)


def test_dummy_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    model = opened(tmp_path, load_format="dummy")
    assert model.model.vision_backbone.pad_embed.std() > 0
    assert model.model.vision_backbone.image_vit.positional_embedding.std() > 0
