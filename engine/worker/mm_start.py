"""What a worker of a model with multimodal inputs is built of."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from engine.model.mm_facts import MMFacts
from engine.multimodal.families import MM_FAMILIES
from engine.worker.encoder_cache import EncoderCache
from engine.worker.mm_slots import InputTokens


def encoder_cache(model: Any, place: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> EncoderCache:
    """An empty encoder cache.

    Args:
        model: an instance of transformers' class, filled.
        place: copies a tensor to the device of the model.
    """
    family = MM_FAMILIES[model.config.model_type]
    return EncoderCache(importlib.import_module(f"engine.model.encoders.{family.encoder}").make(model), place)


def input_tokens(model: Any, facts: MMFacts) -> InputTokens:
    """How the inputs of a model lie in a prompt."""
    family = MM_FAMILIES[model.config.model_type]
    vision = getattr(model.config, "vision_config", None)
    return InputTokens(
        np.array(sorted(facts.embedding_ids), dtype=np.int32),
        family.mrope,
        getattr(vision, "tokens_per_second", None),
        family.joint,
    )
