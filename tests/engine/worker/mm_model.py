"""What a family gives to the parity suite of multimodal models, and helpers to make it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.multimodal.types import MediaKind, Processed
from tests.engine.worker.driver import VOCAB

# Of the decoder of a tiny model: two layers, and logits that lie several units apart.
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def picture(number: int) -> Image.Image:
    """A picture of noise, each number another one and of another shape."""
    noise = np.random.default_rng(number)
    width, height = 40 + 9 * number, 64 - 11 * number % 40
    return Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))


@dataclass(frozen=True, slots=True)
class MMModel:
    """A tiny model of one family.

    Args:
        build: writes the model to a folder (config.json, weights in float32, what its processor reads) and returns it:
            `save` does most of it. Its vocabulary has `driver.VOCAB` tokens.
        reference: called with token ids, int64[1, tokens], and the prompt's processed inputs in order; returns the
            arguments that the class needs besides the ids, such as pixel_values. Called for a prompt, and for a prompt
            with the tokens generated after it.
        media: the sample input of a number; different numbers give different inputs, 1 and 2 with as many
            tokens.
        kind: of the inputs.
        whole: why an input can't be split over chunks; empty: it can be.
        no_prefixes: why prefixes with inputs aren't shared; empty: they are.
        options: of the processor, as a request has them.
    """

    build: Callable[[Path], Any]
    reference: Callable[[torch.Tensor, list[Processed]], dict[str, Any]]
    media: Callable[[int], Any] = picture
    kind: MediaKind = "image"
    whole: str = ""
    no_prefixes: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def save(model: Any, folder: Path, special: tuple[int, ...], scale: float = 1.0) -> Any:
    """Write a model with random weights to a folder, and return it.

    Args:
        special: tokens that are never generated, because they stand for inputs.
        scale: of the random change of biases and norms.
    """
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for values in model.parameters():
            if values.ndim == 1:  # biases begin as zeros, norms as ones: neither would show a mistake
                values += scale * 0.1 * torch.randn(values.shape, generator=generator)
        model.get_output_embeddings().weight[list(special)] = 0  # a logit of 0 is never the highest
    model.save_pretrained(folder)
    return model.eval().requires_grad_(False)


def widened(model: Any, folder: Path) -> Any:
    """Write a model like one that a family built in this folder, and return it: its heads have 16 elements.

    The fused stack needs them, and so it does widths that are multiples of 16 on each of two ranks.
    """
    config = copy.deepcopy(model.config)
    text, vision = config.get_text_config(decoder=True), getattr(config, "vision_config", None)
    narrow = text.hidden_size
    text.hidden_size, text.intermediate_size = 16 * text.num_attention_heads, 64
    if getattr(text, "head_dim", None):
        text.head_dim = 16
    if "mrope_section" in text.rope_parameters:
        pairs = sum(text.rope_parameters["mrope_section"])
        text.rope_parameters["mrope_section"] = [8 * n // pairs for n in text.rope_parameters["mrope_section"]]
    if config.model_type == "qwen2_vl":
        vision.hidden_size = text.hidden_size
    elif getattr(vision, "out_hidden_size", None) == narrow:
        vision.out_hidden_size = text.hidden_size
    silent = (model.get_output_embeddings().weight == 0).all(1).nonzero()[:, 0].tolist()
    torch.manual_seed(7)
    return save(type(model)._from_config(config, dtype=torch.float32), folder, tuple(silent))
