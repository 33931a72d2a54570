"""Builds a model from transformers' own class, with the paged attention plugged in."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.kernels import attention
from engine.kernels.attention import Layout, Ragged, Workspace
from engine.model import adapt
from engine.model.adapt import Forward, KVCache
from engine.model.facts import ModelFacts, read_config

PROBE = 4  # tokens of the check


def load_model(config: EngineConfig, facts: ModelFacts) -> nn.Module:
    """Load the model on the CPU, ready for `adapt.run`.

    Raises ModelError if the weights can't be read, or if a layer doesn't attend through the paged attention.
    """
    adapt.register()
    settings = read_config(facts.path, config)
    try:
        with _quiet():
            model = _random(config, facts, settings) if config.load_format == "dummy" else _stored(facts, settings)
    except KeyError as error:  # the class looks its attention up in a table of its own
        raise ModelError(f"{config.model} can't be run: {_misfit(facts)}: {error}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{config.model}: the weights can't be loaded: {_first_line(error)}") from error
    model.eval().requires_grad_(False)
    check(model, config, facts)
    return model


def _random(config: EngineConfig, facts: ModelFacts, settings: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return AutoModelForCausalLM.from_config(
            settings, dtype=getattr(torch, facts.dtype), attn_implementation=adapt.ATTENTION
        )


def _stored(facts: ModelFacts, settings: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        facts.path,
        config=settings,
        dtype=getattr(torch, facts.dtype),
        attn_implementation=adapt.ATTENTION,
        output_loading_info=True,
    )
    model, found = loaded
    for problem, names in (("lacks", found["missing_keys"]), ("has other shapes for", found["mismatched_keys"])):
        if names:
            first = sorted(str(name) for name in names)[0]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"the checkpoint {problem} {first}{more}")
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and reports: what matters of them is raised here."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(level)


def _misfit(facts: ModelFacts) -> str:
    return f"{facts.architecture} doesn't fit the attention interface"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def layout_of(facts: ModelFacts, block_size: int) -> Layout:
    """The cache layout of every layer of the model."""
    return Layout(block_size, facts.num_kv_heads, facts.head_dim, getattr(torch, facts.dtype))


@torch.inference_mode()
def check(model: Any, config: EngineConfig, facts: ModelFacts) -> None:
    """Run a few tokens through a small cache: the one sure sign that a class takes part in the attention interface."""
    layout = layout_of(facts, PROBE)
    cache = KVCache(facts.num_layers, 2, layout)
    table, positions = np.ones((1, 1), dtype=np.int32), np.arange(PROBE)
    zero = np.zeros(1, dtype=np.int64)
    index = attention.write_index(table, np.zeros(PROBE, dtype=np.int64), positions, layout)
    ragged = Ragged(zero, zero + PROBE, zero, table)
    forward = Forward(cache, ragged, index, Workspace(layout.dtype))
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
    if forward.layers_seen != set(range(facts.num_layers)) or tuple(logits.shape) != (1, 1, facts.vocab_size):
        raise ModelError(
            f"{config.model} can't be run: {_misfit(facts)}: "
            f"{len(forward.layers_seen)} of {facts.num_layers} layers use it, logits have shape {tuple(logits.shape)}"
        )
