"""All items of the GPU check by name. An item raises to fail, or `SkipError`, and reports rows."""

from collections.abc import Callable
from typing import Any

from tests.gpu import (
    block_items,
    fact_items,
    kernel_items,
    model_items,
    parity_items,
    rank_items,
    serve_items,
    tool_items,
)

ITEMS: dict[str, Callable[..., Any]] = {
    "facts": fact_items.facts,
    "kernels": kernel_items.kernels,
    "parity": parity_items.parity,
    "load": model_items.load,
    "steps": model_items.steps,
    "attention speed": model_items.attention_speed,
    "idle": model_items.idle,
    "profile": model_items.profile,
    "serve": serve_items.serve_load,
    "out of memory": fact_items.out_of_memory,
    "ranks": rank_items.ranks,
    "KV blocks": block_items.kv_blocks,
    "resources": tool_items.resources,
    "tiles": tool_items.tiles,
    "sanitizer": tool_items.sanitizer,
}
