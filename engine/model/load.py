"""Opens a model of transformers' own class, with the paged attention plugged in, and gives it its weights."""

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.kernels.attention import Layout, Ragged, Workspace
from engine.model import adapt
from engine.model.adapt import Forward, KVCache
from engine.model.blank import Blank, RandomSource, StoredSource, first_paths, parameters_on_meta
from engine.model.facts import ModelFacts, original_length, read_config, stored_tensors
from engine.model.recipe import make_recipe
from engine.pretrained import build_causal_lm

Progress = Callable[[int, int], None]  # bytes that were read, and all

PROBE = 4  # tokens of the check
TELL_S = 0.1  # at the soonest, between two words of progress
# What old checkpoints hold although it can be computed.
INERT = re.compile(r"inv_freq$|\.attn\.(masked_)?bias$|\.attention\.(masked_)?bias$")

log = logging.getLogger("redline.worker")


def open_model(config: EngineConfig, facts: ModelFacts, progress: Progress | None = None) -> Blank:
    """Build the class without numbers, and find out where they are; `progress` hears how far it is.

    Raises ModelError if the class can't be built, or the checkpoint lacks something.
    """
    adapt.register()
    settings = read_config(facts.path, config)
    try:
        with _quiet(), parameters_on_meta():
            model = _build(settings, facts)
    except KeyError as error:  # the class looks its attention up in a table of its own
        raise ModelError(f"{config.model} can't be run: {_misfit(facts)}: {error}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{config.model}: the model can't be built: {_first_line(error)}") from error
    model.tie_weights()
    _pin_rope(model, facts.max_model_len)
    model.eval().requires_grad_(False)
    exact = list(model._get_dtype_plan(getattr(torch, facts.dtype)))
    if config.load_format == "dummy":
        return Blank(model, RandomSource(model, config.seed), exact)
    return Blank(model, _stored(model, config, facts, progress), exact)


def _build(settings: Any, facts: ModelFacts) -> Any:
    return build_causal_lm(settings, dtype=getattr(torch, facts.dtype), attn_implementation=adapt.ATTENTION)


def _pin_rope(model: Any, max_model_len: int) -> None:
    """Choose between the two lists of factors of a longrope by the length of requests, once.

    The class chooses anew in each step, by the longest position of the batch: keys in the cache would not fit.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for module in model.modules():
        if getattr(module, "rope_type", None) == "longrope":
            original = original_length(module.config)
            assert original is not None
            if max_model_len > original:
                frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, torch.device("cpu"), original + 1)
                module.inv_freq.copy_(frequencies)
            module.rope_type = "pinned"


def _stored(model: Any, config: EngineConfig, facts: ModelFacts, progress: Progress | None) -> StoredSource:
    stored = stored_tensors(config, facts.path, model.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        recipe = make_recipe(model, {name: tensor.shape for name, tensor in stored.items()}, shapes)
    except ModelError as error:
        raise ModelError(f"{config.model}: the weights can't be loaded: {error}") from error
    same = first_paths(model.state_dict(keep_vars=True))
    known = {same[name] for name in recipe.pieces}
    for name in list(recipe.pieces):  # of parameters that are the same, the checkpoint may name any
        recipe.pieces.setdefault(same[name], recipe.pieces[name])
    missing = sorted(name for name in shapes if same[name] not in known)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{config.model}: the weights can't be loaded: the checkpoint lacks {missing[0]}{more}")
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    unused = [name for name in recipe.unused if not INERT.search(name) and not any(one.search(name) for one in ignored)]
    if unused:
        log.warning(
            "%s: %d tensors of the checkpoint aren't used, %s the first: this model has no place for them",
            config.model,
            len(unused),
            unused[0],
        )
    if progress is None:
        return StoredSource(stored, recipe)
    used = {piece.stored for pieces in recipe.pieces.values() for piece in pieces}
    return StoredSource(stored, recipe, _Meter(sum(stored[name].bytes for name in used), progress).add)


class _Meter:
    """Tells how far reading is, now and then."""

    def __init__(self, total: int, progress: Progress):
        self._total = total
        self._progress = progress
        self._done = 0
        self._told = 0.0

    def add(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._told >= TELL_S or self._done == self._total:
            self._told = now
            self._progress(self._done, self._total)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' reports: what matters of them is raised here."""
    from transformers.utils import logging as reports

    level = reports.get_verbosity()
    reports.set_verbosity_error()
    try:
        yield
    finally:
        reports.set_verbosity(level)


def _misfit(facts: ModelFacts) -> str:
    return f"{facts.architecture} doesn't fit the attention interface"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def layout_of(facts: ModelFacts, block_size: int) -> Layout:
    """The cache layout of every layer of the model."""
    return Layout(block_size, facts.num_kv_heads, facts.head_dim, getattr(torch, facts.dtype))


def complete(blank: Blank, config: EngineConfig, facts: ModelFacts) -> nn.Module:
    """Fill a model that runs as transformers' class, and see it run; `facts` are the rank's.

    Raises ModelError if the weights can't be read, or if a layer doesn't attend through the paged attention.
    """
    blank.fill()
    check(blank.model, config, facts, blank.vocabulary.count if blank.vocabulary else facts.vocab_size)
    return blank.model


@torch.inference_mode()
def check(model: Any, config: EngineConfig, facts: ModelFacts, vocabulary: int) -> None:
    """Run a few tokens through a small cache: the one sure sign that a class takes part in the attention interface.

    vocabulary: how many logits a token has.
    """
    layout = layout_of(facts, PROBE)
    cache = KVCache(facts.kv_groups, len(facts.kv_groups.windows) + 1, layout)
    tables, positions = np.arange(1, cache.keys[0].shape[0], dtype=np.int32)[:, None, None], np.arange(PROBE)
    zero = np.zeros(1, dtype=np.int64)
    ragged = Ragged(zero, zero + PROBE, zero, tables)
    forward = Forward.of(cache, ragged, np.zeros(PROBE, dtype=np.int64), positions, Workspace(layout.dtype))
    arguments = {
        "input_ids": torch.arange(PROBE)[None] % facts.vocab_size,
        "position_ids": torch.from_numpy(positions)[None],
        "use_cache": False,
        "logits_to_keep": torch.tensor([PROBE - 1]),
    }
    try:
        logits = adapt.run(model, forward, arguments).logits
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        raise ModelError(f"{config.model} can't be run: {_misfit(facts)}: {_first_line(error)}") from error
    if forward.layers_seen != set(range(facts.num_layers)) or tuple(logits.shape) != (1, 1, vocabulary):
        raise ModelError(
            f"{config.model} can't be run: {_misfit(facts)}: "
            f"{len(forward.layers_seen)} of {facts.num_layers} layers use it, logits have shape {tuple(logits.shape)}"
        )
