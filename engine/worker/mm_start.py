"""What a worker of a model with multimodal inputs is built of."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.model.composed_decoder import outer_modules
from engine.model.mm_facts import MMFacts
from engine.multimodal.families import MM_FAMILIES, joint_ids
from engine.worker.encoder_cache import EncoderCache
from engine.worker.mm_slots import InputTokens


def encoder_cache(
    model: Any, place: Callable[[Tensor], Tensor] = lambda tensor: tensor, dtype: torch.dtype | None = None
) -> EncoderCache:
    """An empty encoder cache.

    Args:
        model: an instance of transformers' class, filled; pipeline stages may lack its head.
        place: copies a tensor to the device of the model.
        dtype: of the encoder, whose parameters are converted; None: that of the model.
    """
    family = MM_FAMILIES[model.config.model_type]
    embeddings: torch.dtype = model.get_input_embeddings().weight.dtype
    if dtype is not None:
        for module in outer_modules(model):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.dtype == embeddings:
                    module._buffers[name] = buffer.to(dtype)
    encoder = importlib.import_module(f"engine.model.encoders.{family.encoder}").make(model)
    hidden: int = model.config.get_text_config(decoder=True).hidden_size
    layers = len(model.config.vision_config.deepstack_visual_indexes) if family.deepstack else 0
    return EncoderCache(encoder, place, embeddings, hidden, layers)


def input_tokens(model: Any, facts: MMFacts) -> InputTokens:
    """How the inputs of a model lie in a prompt."""
    family = MM_FAMILIES[model.config.model_type]
    vision = getattr(model.config, "vision_config", None)
    return InputTokens(
        np.array(sorted(facts.embedding_ids), dtype=np.int32),
        family.mrope,
        getattr(vision, "tokens_per_second", None),
        bool(family.joint),
        np.array(sorted(joint_ids(family, model.config)), dtype=np.int32) if family.joint else None,
    )
