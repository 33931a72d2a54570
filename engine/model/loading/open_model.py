"""Builds a model of transformers' class with paged attention, and fills it with its weights."""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.kernels.attention import Layout, Ragged, Workspace
from engine.model.checkpoints.reader import Reader
from engine.model.checkpoints.weight_mapping import COMPUTED, WeightMapping, map_weights
from engine.model.composed_decoder import build_composite
from engine.model.loading.meta_model import MetaModel, parameters_on_meta
from engine.model.loading.weight_sources import CheckpointSource, RandomSource, checkpoint_source, share_tied
from engine.model.model_info import ModelInfo, checkpoint_tensors, longrope_original_length, read_hf_config
from engine.model.pooling import with_tied_head
from engine.model.runtime import attention_interface
from engine.model.runtime.attention_interface import ForwardContext, KVCache
from engine.multimodal.families import MM_FAMILIES
from engine.pooling import PoolingSpec
from engine.pretrained import build_causal_lm, build_encoder
from engine.text import first_line

Progress = Callable[[int, int], None]  # bytes read, bytes in all

TOWER_ATTENTION = "sdpa"  # of encoders
HEAD = "score.weight"  # of decoders with a classification head
PROBE = 4  # tokens of the check

log = logging.getLogger("redline.worker")


def open_model(config: EngineConfig, model_info: ModelInfo, progress: Progress | None = None) -> MetaModel:
    """Build the class on the meta device, and locate its weights.

    Raises ModelError if the class can't be built, or if the checkpoint lacks weights.

    Args:
        config: the engine's configuration.
        model_info: of the whole model.
        progress: called with the bytes read and the total while weights are filled.
    """
    attention_interface.register()
    hf_config = read_hf_config(model_info.path, config)
    dtype = getattr(torch, model_info.dtype)
    try:
        with _quiet_transformers(), parameters_on_meta():
            model = _build_class(hf_config, dtype, model_info.pooling)
    except KeyError as error:  # the class looks up its attention in a table of its own
        raise ModelError(f"{config.model} can't be run: {_does_not_fit(model_info)}: {error}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{config.model}: the model can't be built: {first_line(error)}") from error
    model.tie_weights()
    _pin_rope(model, model_info.max_model_len)
    model.eval().requires_grad_(False)
    keep_float32 = list(model._get_dtype_plan(dtype))
    if config.load_format == "dummy":
        return MetaModel(model, RandomSource(model, config.seed), keep_float32)
    return MetaModel(model, _checkpoint_source(model, config, model_info, progress), keep_float32)


def _build_class(hf_config: Any, dtype: torch.dtype, pooling: PoolingSpec | None) -> Any:
    """The class with paged attention in its decoder; towers and encoders keep transformers' own."""
    if pooling is not None and pooling.encoder:
        return build_encoder(hf_config, classifies=pooling.task == "classify", dtype=dtype)
    if pooling is not None:
        hf_config = with_tied_head(hf_config)
        model = build_causal_lm(hf_config, dtype=dtype, attn_implementation=attention_interface.ATTENTION)
        model._keys_to_ignore_on_load_unexpected = [*(model._keys_to_ignore_on_load_unexpected or ()), HEAD]
        return model
    if hf_config.model_type in MM_FAMILIES:
        attention = {"": TOWER_ATTENTION, "text_config": attention_interface.ATTENTION}
        return build_composite(hf_config, dtype=dtype, attn_implementation=attention)
    return build_causal_lm(hf_config, dtype=dtype, attn_implementation=attention_interface.ATTENTION)


def _pin_rope(model: Any, max_model_len: int) -> None:
    """Choose between the two factor lists of a longrope once, by the maximum length of requests.

    The class chooses in each step, by the longest position of the batch, which would not fit keys in the cache.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for module in model.modules():
        if getattr(module, "rope_type", None) == "longrope":
            original = longrope_original_length(module.config)
            assert original is not None
            if max_model_len > original:
                frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, torch.device("cpu"), original + 1)
                module.inv_freq.copy_(frequencies)
            module.rope_type = "pinned"


def _checkpoint_source(
    model: Any, config: EngineConfig, model_info: ModelInfo, progress: Progress | None
) -> CheckpointSource:
    stored = checkpoint_tensors(config, model_info.path, model.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        mapping = map_weights(model, {name: tensor.shape for name, tensor in stored.items()}, shapes)
        if missing := share_tied(mapping, model):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ModelError(f"the checkpoint lacks {missing[0]}{more}")
    except ModelError as error:
        raise ModelError(f"{config.model}: the weights can't be loaded: {error}") from error
    _warn_unused(mapping, model, config.model)
    return checkpoint_source(stored, mapping, progress)


def _warn_unused(mapping: WeightMapping, model: Any, name: str) -> None:
    ignored = [COMPUTED, *map(re.compile, model._keys_to_ignore_on_load_unexpected or ())]
    unused = [one for one in mapping.unused if not any(pattern.search(one) for pattern in ignored)]
    if unused:
        log.warning(
            "%s: the model has no parameters for %d of the checkpoint's tensors, for example %s",
            name,
            len(unused),
            unused[0],
        )


def read_head(config: EngineConfig, model_info: ModelInfo) -> torch.Tensor:
    """The classification head of a decoder, float32 [labels, hidden]; random with dummy weights.

    Raises ModelError if the checkpoint has none.
    """
    assert model_info.pooling is not None, "the model generates"
    shape = model_info.pooling.width, model_info.hidden_size
    head = torch.empty(shape)
    if config.load_format == "dummy":
        return head.normal_(std=0.02, generator=torch.Generator().manual_seed(config.seed))
    stored = checkpoint_tensors(config, model_info.path, read_hf_config(model_info.path, config)).get(HEAD)
    if stored is None or tuple(stored.shape) != shape:
        found = "lacks it" if stored is None else f"has one of shape {tuple(stored.shape)}"
        raise ModelError(f"{config.model}: the head {HEAD} must have the shape {shape}, but the checkpoint {found}")
    with contextlib.closing(Reader()) as reader:
        reader.copy(stored, (0, 0), head)
    return head


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """A context without transformers' log messages; problems that matter are raised by `open_model`."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _does_not_fit(model_info: ModelInfo) -> str:
    return f"{model_info.architecture} doesn't fit the attention interface"


def kv_layout(model_info: ModelInfo, block_size: int) -> Layout:
    """The KV cache layout of every layer of the model."""
    return Layout(block_size, model_info.num_kv_heads, model_info.head_dim, getattr(torch, model_info.dtype))


def fill_and_check(meta_model: MetaModel, config: EngineConfig, model_info: ModelInfo) -> nn.Module:
    """Fill a model that runs as transformers' class, and check that its decoder, which is returned, uses the paged
    attention.

    `model_info` is the rank's. Raises ModelError if the weights can't be read, or if the check fails.
    """
    meta_model.fill()
    check_attention(meta_model, config, model_info)
    decoder: nn.Module = meta_model.decoder
    return decoder


@torch.inference_mode()
def check_attention(
    meta_model: MetaModel, config: EngineConfig, model_info: ModelInfo
) -> tuple[tuple[int, int | None], ...]:
    """Run a few tokens through a small cache: only this shows that all layers of a class use the attention interface.

    Of a pipeline stage these are its own layers; logits are checked where the stage has the head.

    Returns the KV groups and windows that the layers use, None for full attention. Raises ModelError if the model does
    not fit.
    """
    vocab_shard = meta_model.vocab_shard
    num_logits = vocab_shard.count if vocab_shard else model_info.vocab_size
    layout = kv_layout(model_info, PROBE)
    cache = KVCache(model_info.kv_groups, len(model_info.kv_groups.windows) + 1, layout)
    tables, positions = np.arange(1, cache.keys[0].shape[0], dtype=np.int32)[:, None, None], np.arange(PROBE)
    zero = np.zeros(1, dtype=np.int64)
    ragged = Ragged(zero, zero + PROBE, zero, tables)
    context = ForwardContext.build(cache, ragged, np.zeros(PROBE, dtype=np.int64), positions, Workspace(layout.dtype))
    arguments = {
        "input_ids": torch.arange(PROBE)[None] % model_info.vocab_size,
        "position_ids": torch.from_numpy(positions)[None],
        "use_cache": False,
    }
    refusal = f"{config.model} can't be run: {_does_not_fit(model_info)}"
    shape: tuple[int, ...] | None = None
    try:
        if model_info.stage is not None and not model_info.stage.has_head:
            attention_interface.run_model(meta_model.decoder.base_model, context, arguments)
        else:
            arguments["logits_to_keep"] = torch.tensor([PROBE - 1])
            shape = tuple(attention_interface.run_model(meta_model.decoder, context, arguments).logits.shape)
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        raise ModelError(f"{refusal}: {first_line(error)}") from error
    if context.layers_seen != set(model_info.layers) or shape not in (None, (1, 1, num_logits)):
        raise ModelError(
            f"{refusal}: {len(context.layers_seen)} of {len(model_info.layers)} layers use it, logits have shape "
            f"{shape}"
        )
    return tuple(context.plans)
