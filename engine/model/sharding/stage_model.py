"""Reduces a model on the meta device to the layers of one pipeline stage."""

from collections.abc import Iterable
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


class StageLayers(nn.ModuleList):
    """The layers of a stage. Their paths have the numbers of the whole model; indices count from the first of them."""

    def __init__(self, layers: Iterable[nn.Module], begin: int):
        super().__init__()
        for number, layer in enumerate(layers, begin):
            self.add_module(str(number), layer)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]


def keep_layers(meta_model: MetaModel, stage: Stage) -> None:
    """Remove the layers of other stages.

    Raises ModelError if the class has no list of layers.
    """
    decoder = meta_model.decoder
    layers, base = _layers(decoder), decoder.base_model
    count, own = len(layers), slice(stage.begin, stage.end)
    meta_model.replace(layers, StageLayers(layers[own], stage.begin))
    # Classes count the layers that they call. Of a model with towers, config and base may have configs of their own.
    configs = decoder.config, getattr(base, "config", decoder.config)
    for config in {id(one): one for one in configs}.values():
        config.num_hidden_layers = len(stage.layers)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[own]
    for name, each in list(vars(base).items()):
        if isinstance(each, list) and len(each) == count:  # kinds of layers (Molmo 2)
            setattr(base, name, each[own])


def layers_path(meta_model: MetaModel) -> str:
    """The path of the list of layers."""
    return meta_model.path(_layers(meta_model.decoder))


def connect_stage(meta_model: MetaModel, stage: Stage) -> StageStates:
    """Prepare a class for hidden states of other stages, without an embedding or a head that it doesn't need."""
    decoder: Any = meta_model.decoder
    embedding, head = decoder.get_input_embeddings(), decoder.get_output_embeddings()
    if not stage.is_first:
        meta_model.replace(embedding, NoEmbedding(embedding.embedding_dim, embedding.weight.dtype))
        _drop_towers(meta_model)
    if not stage.has_head:
        meta_model.replace(head, nn.Identity())
    return StageStates(_layers(decoder))


def _drop_towers(meta_model: MetaModel) -> None:
    """Remove what is outside of decoder and head: another stage encodes."""
    needed = {*meta_model.decoder.modules()}

    def drop_within(module: nn.Module) -> None:
        for part in list(module.children()):
            if part in needed:
                continue
            if needed.isdisjoint(part.modules()):
                meta_model.replace(part, nn.Identity())
            else:
                drop_within(part)

    if meta_model.decoder is not meta_model.model:
        drop_within(meta_model.model)


def _layers(decoder: Any) -> nn.ModuleList:
    count = decoder.config.num_hidden_layers
    for module in decoder.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(f"{type(decoder).__name__} can't be divided into stages (--pp): it has no list of {count} layers")
