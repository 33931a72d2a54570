"""The configuration of one engine: made once by the command line or the Python API, then never changed."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from engine.errors import ConfigError

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
Device = Literal["auto", "cpu"]

DTYPES: tuple[str, ...] = ("auto", "bfloat16", "float16", "float32")
LOAD_FORMATS: tuple[str, ...] = ("auto", "safetensors", "gguf", "dummy")
DEVICES: tuple[str, ...] = ("auto", "cpu")

KV_ALLOCATION = "--kv-cache-memory-bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the user asked for; None means: from the model or the device (see `engine.memory`)."""

    model: str  # as given: a short name, a folder, or a hub id
    tokenizer: str | None = None  # a folder; None: the model's own
    served_model_name: str | None = None
    tensor_parallel_size: int = 1
    dtype: Dtype = "auto"
    max_model_len: int | None = None  # tokens of one request, prompt and output
    max_num_seqs: int | None = None  # rows
    max_num_batched_tokens: int | None = None  # the budget: tokens a step
    block_size: int | None = None  # tokens a block
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float | None = None  # share of the device's free memory that the engine may take
    enable_prefix_caching: bool = True
    seed: int = 0
    load_format: LoadFormat = "auto"
    device: Device = "auto"
    num_layers: int | None = None  # with dummy weights: fewer layers than the config says

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{flag(name)} must be at least 1, not {value}")
        if self.block_size is not None and (self.block_size < 1 or self.block_size & (self.block_size - 1)):
            raise ConfigError(f"--block-size must be a power of two, not {self.block_size}")
        share = self.gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise ConfigError(f"--gpu-memory-utilization must lie in (0, 1], not {share}")
        if self.kv_cache_memory_bytes is not None and self.kv_cache_memory_bytes < 1:
            raise ConfigError(f"{KV_ALLOCATION} must be at least 1, not {self.kv_cache_memory_bytes}")
        rows, budget = self.max_num_seqs, self.max_num_batched_tokens
        if rows is not None and budget is not None and budget < rows:
            raise ConfigError(
                f"--max-num-batched-tokens ({budget}) must not be below --max-num-seqs ({rows}): "
                "each running request needs one token a step"
            )
        for name, allowed in (("dtype", DTYPES), ("load_format", LOAD_FORMATS), ("device", DEVICES)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{flag(name)} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")

    def describe(self) -> dict[str, Any]:
        """Plain data, for the start table and result files."""
        return dataclasses.asdict(self)

    @property
    def name(self) -> str:
        """The name clients use for the model."""
        return self.served_model_name or self.model


def flag(field: str) -> str:
    """The command-line flag of a field."""
    names = {"tensor_parallel_size": "--tp", "kv_cache_memory_bytes": KV_ALLOCATION}
    return names.get(field, "--" + field.replace("_", "-"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig:
    """Every choice made: what the scheduler and the workers run by."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int  # with the null block, number 0
    enable_prefix_caching: bool
