"""Public Python API: `from redline import LLM, SamplingParams`."""

from typing import TYPE_CHECKING, Any

from engine.config import EngineConfig
from engine.errors import ConfigError, EngineDeadError, ModelError, OutOfMemoryError, RedlineError, RequestError

if TYPE_CHECKING:
    from engine.frontend.sampling_params import SamplingParams
    from engine.frontend.structured_outputs import StructuredOutputs
    from engine.llm import LLM
    from engine.llm_outputs import CompletionOutput, EmbeddingRequestOutput, RequestOutput, ScoringRequestOutput

__all__ = [
    "LLM",
    "CompletionOutput",
    "ConfigError",
    "EmbeddingRequestOutput",
    "EngineConfig",
    "EngineDeadError",
    "ModelError",
    "OutOfMemoryError",
    "RedlineError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "ScoringRequestOutput",
    "StructuredOutputs",
]

_LAZY = {
    "LLM": "engine.llm",
    "CompletionOutput": "engine.llm_outputs",
    "EmbeddingRequestOutput": "engine.llm_outputs",
    "RequestOutput": "engine.llm_outputs",
    "ScoringRequestOutput": "engine.llm_outputs",
    "SamplingParams": "engine.frontend.sampling_params",
    "StructuredOutputs": "engine.frontend.structured_outputs",
}


def __getattr__(name: str) -> Any:
    """Import modules with heavy dependencies on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
