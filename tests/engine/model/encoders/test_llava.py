"""Encoders give the embeddings that transformers' classes put in the place of an image's tokens.

Each class is called with two images at once, and its encoder with one at a time.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.multimodal.families import MM_FAMILIES, embedding_ids
from engine.multimodal.types import Processed
from tests.engine.multimodal.llava_configs import IMAGE, config_of, model_of, noise

KINDS = ["llava", "llava-siglip", "pixtral", "llava_next", "llava_onevision", "mistral3"]
SIZES = [(50, 40), (20, 61)]


def encoded(model: Any, inputs: list[Processed]) -> list[Tensor]:
    encoder = import_module(f"engine.model.encoders.{MM_FAMILIES[model.config.model_type].encoder}").make(model)
    with torch.inference_mode():
        return [
            encoder.encode({name: torch.tensor(values) for name, values in one.tensors.items()}).embeddings
            for one in inputs
        ]


def processed(config: Any, sizes: list[tuple[int, int]], count: int) -> list[Processed]:
    processor = import_module(f"engine.multimodal.processors.{MM_FAMILIES[config.model_type].processor}")
    ours = processor.make(Path("/nonexistent"), config)
    return [ours.process("image", noise(*size, seed), count, {}) for seed, size in enumerate(sizes)]


def replaced(model: Any, inputs: list[Processed], **more: Any) -> Tensor:
    """The embeddings of the image tokens that the decoder of transformers' class is called with."""
    seen: list[Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    tokens = [1, *(token for one in inputs for token in [2, *one.tokens]), 3]
    with torch.inference_mode():
        model(input_ids=torch.tensor([tokens]), **more)
    hook.remove()
    return seen[0][0, torch.tensor(tokens) == IMAGE]


def stacked(inputs: list[Processed]) -> dict[str, Tensor]:
    """The tensors of several images as transformers' classes take them, padded to one shape."""
    pixels = [one.tensors["pixel_values"][0] for one in inputs]
    shape = [max(sizes) for sizes in zip(*(one.shape for one in pixels), strict=True)]
    padded = [np.pad(one, [(0, most - now) for most, now in zip(shape, one.shape, strict=True)]) for one in pixels]
    tensors = {"pixel_values": torch.tensor(np.stack(padded))}
    if "image_sizes" in inputs[0].tensors:
        tensors["image_sizes"] = torch.tensor(np.concatenate([one.tensors["image_sizes"] for one in inputs]))
    return tensors


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_class(kind: str) -> None:
    model = model_of(kind)
    inputs = processed(model.config, SIZES, 1)
    more = stacked(inputs)
    if model.config.vision_config.model_type == "pixtral":
        more["image_sizes"] = torch.tensor([one.tensors["pixel_values"].shape[-2:] for one in inputs])
    expected = replaced(model, inputs, **more)
    found = torch.cat(encoded(model, inputs))
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-5)
    ids = {IMAGE, model.config.video_token_index} if kind == "llava_onevision" else {IMAGE}
    assert embedding_ids(MM_FAMILIES[model.config.model_type], model.config) == ids
    for one, embeddings in zip(inputs, encoded(model, inputs), strict=True):
        assert one.tokens.count(IMAGE) == len(embeddings)


def test_onevision_with_several_images_in_a_prompt() -> None:
    model = model_of("llava_onevision")
    inputs = processed(model.config, SIZES, 2)
    expected = replaced(model, inputs, **stacked(inputs), batch_num_images=torch.tensor([2]))
    assert torch.allclose(torch.cat(encoded(model, inputs)), expected, atol=1e-5)


@pytest.mark.parametrize("layers", [-1, [-2, -1], [0, 2]])
def test_layers_whose_features_are_used(layers: int | list[int]) -> None:
    model = model_of("llava", vision_feature_layer=layers)
    inputs = processed(model.config, SIZES, 1)
    assert torch.allclose(torch.cat(encoded(model, inputs)), replaced(model, inputs, **stacked(inputs)), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 60), (60, 1), (4, 4)])
def test_odd_sizes_have_an_embedding_for_each_token(kind: str, size: tuple[int, int]) -> None:
    model = model_of(kind)
    [one] = processed(config_of(kind), [size], 1)
    assert len(encoded(model, [one])[0]) == one.tokens.count(IMAGE) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_of_the_model(kind: str) -> None:
    model = model_of(kind).to(torch.bfloat16)
    assert encoded(model, processed(model.config, [(30, 20)], 1))[0].dtype == torch.bfloat16
