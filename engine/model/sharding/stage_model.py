"""Reduces a model on the meta device to the layers of one pipeline stage."""

from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import ModelError
from engine.model.loading.meta_model import MetaModel
from engine.model.runtime.stage_states import StageStates
from engine.model.stage import Stage


class NoEmbedding(nn.Module):
    """In place of the embedding where another stage embeds: zeros of its shape, which nothing reads."""

    def __init__(self, width: int, dtype: torch.dtype):
        super().__init__()
        self._width = width
        self._dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, self._width, dtype=self._dtype)


def keep_layers(meta_model: MetaModel, stage: Stage) -> None:
    """Remove the layers of other stages. Tensor-parallel ranks must have been sharded before.

    Raises ModelError if the class has no list of layers.
    """
    decoder = meta_model.decoder
    layers, config = _layers(decoder), decoder.config
    del layers[stage.end :]
    del layers[: stage.begin]
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):  # classes count the layers that they call
        config.layer_types = config.layer_types[stage.begin : stage.end]


def connect_stage(meta_model: MetaModel, stage: Stage) -> StageStates:
    """Prepare a class for hidden states of other stages, without an embedding or a head that it doesn't need."""
    decoder: Any = meta_model.decoder
    embedding, head = decoder.get_input_embeddings(), decoder.get_output_embeddings()
    if not stage.is_first:
        meta_model.replace(embedding, NoEmbedding(embedding.embedding_dim, embedding.weight.dtype))
    if not stage.is_last:
        meta_model.replace(head, nn.Identity())
    return StageStates(_layers(decoder))


def _layers(decoder: Any) -> nn.ModuleList:
    count = decoder.config.num_hidden_layers
    for module in decoder.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(f"{type(decoder).__name__} can't be divided into stages (--pp): it has no list of {count} layers")
