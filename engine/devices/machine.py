"""What a device offers to an engine: its memory, its defaults, its warnings."""

from dataclasses import dataclass
from typing import Protocol

from engine.config import DRIVER_BROADCAST, EngineConfig
from engine.errors import ConfigError
from engine.model.model_info import ITEMSIZE, ModelInfo

QUERY_TILE = 64  # queries that the attention in torch computes at a time
MIN_GATHERED_TOKENS = 32 << 10  # of its gather buffers
SAMPLING_COPIES = 8  # of float32 logits: weights, sorted weights with their indices, sums


@dataclass(frozen=True, slots=True)
class Defaults:
    """Values of options that the user did not give."""

    max_num_seqs: int
    max_num_batched_tokens: int
    min_chunk: int  # prompt tokens that fit a step in which all requests decode
    block_size: int  # tokens
    memory_utilization: float  # fraction of the available memory that the engine may take


@dataclass(frozen=True, slots=True)
class StepTokens:
    """Tokens that a step may compute if the user does not say how many."""

    count: int
    source: str  # why so many, in words


def replica_flags(config: EngineConfig) -> dict[str, int]:
    """The flags that give the number of replicas, with their values; empty if there is one replica."""
    if config.prefill_replicas:
        return {"--prefill-replicas": config.prefill_replicas, "--decode-replicas": config.decode_replicas}
    return {"--dp": config.data_parallel_size} if config.data_parallel_size > 1 else {}


class Machine(Protocol):
    """Used in the EngineCore's process before a model is loaded."""

    defaults: Defaults
    torch_type: str  # of the device, for one whose steps are enqueued; empty: the CPU
    kernels: str  # triton or torch; those of the CPU are chosen with the model: auto
    tile_table: str  # the file with measured tiles of attention; empty: none
    simulated: str  # the hardware that is simulated, in words; empty: the device is real

    def available_memory(self) -> int:
        """Bytes that one replica could take now, on all its ranks together."""
        ...

    def environment(self, replica: int) -> dict[str, str]:
        """Environment variables that give a replica devices of its own; empty if all replicas share one.

        Raises ConfigError if there are too few devices.
        """
        ...

    def workspace(self, model_info: ModelInfo, max_num_seqs: int, max_num_batched_tokens: int, block_size: int) -> int:
        """Upper bound of the bytes that a step allocates on one rank; `model_info` is the rank's."""
        ...

    def step_tokens(self, config: EngineConfig, model_info: ModelInfo) -> StepTokens:
        """The default token budget, before there is room for a token of each request."""
        ...

    def encoder_dtype(self, dtype: str) -> str:
        """The dtype of the encoders of multimodal inputs of a model of this dtype."""
        ...

    def adapt(self, config: EngineConfig) -> EngineConfig:
        """The configuration as the device understands it. Raises ConfigError for values that it does not have."""
        ...

    def describe(self, config: EngineConfig) -> str:
        """The device in the start table."""
        ...

    def warnings(self, config: EngineConfig) -> list[str]:
        """What the user should know about this configuration on this device."""
        ...


def default_step_tokens(defaults: Defaults) -> StepTokens:
    """Those of a device whose budget does not depend on the model."""
    return StepTokens(defaults.max_num_batched_tokens, "default")


def check_options(config: EngineConfig, device: str, kernels: tuple[str, ...]) -> None:
    """Raise ConfigError for options that devices other than the CPU do not support."""
    if config.kernels not in kernels:
        raise ConfigError(f"--kernels {config.kernels} does not work on {device}: use {' or '.join(kernels)}")
    if config.deterministic:
        raise ConfigError(
            f"--deterministic does not work on {device}: the size of the batch decides in which order its kernels add "
            "numbers up; use --device cpu"
        )
    if DRIVER_BROADCAST in config.ablations:
        raise ConfigError(
            f"--ablate {DRIVER_BROADCAST}, a part of --engine v0 with --tp, does not work on {device}: use --device cpu"
        )


def refuse_tile_table(config: EngineConfig, device: str) -> None:
    """Raise ConfigError if a tile table was given for a device that does not run the Triton kernels."""
    if config.tile_table is not None:
        raise ConfigError(f"--tile-table needs the Triton kernels, which do not run {device}: leave it out")


def refuse_quantized(config: EngineConfig, reason: str) -> None:
    """Raise ConfigError for options that only kernels have which the device can't use, for this reason."""
    for flag, value in (("--quantization", config.quantization), ("--kv-cache-dtype", config.kv_cache_dtype)):
        if value is not None:
            raise ConfigError(f"{flag} {value} needs the Triton kernels: {reason}")


def activation_bytes(model_info: ModelInfo, max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """Upper bound of a step's activations, and of logits and their copies while tokens are chosen on the device."""
    logits = max_num_seqs * model_info.vocab_size * (ITEMSIZE[model_info.dtype] + SAMPLING_COPIES * 4)
    return max_num_batched_tokens * bytes_per_token(model_info) + logits


def bytes_per_token(model_info: ModelInfo) -> int:
    """Upper bound of the activations of one token."""
    query = model_info.num_heads * model_info.head_dim
    key_value = 2 * model_info.num_kv_heads * model_info.head_dim
    numbers = 4 * model_info.hidden_size + 2 * model_info.intermediate_size + 3 * query + 2 * key_value
    return numbers * ITEMSIZE[model_info.dtype] + 2 * model_info.hidden_size * 4


def gathered_attention_bytes(model_info: ModelInfo, block_size: int) -> int:
    """Upper bound of the gathered keys and values, and of the scores, of the attention in torch."""
    item = ITEMSIZE[model_info.dtype]
    key_value = 2 * model_info.num_kv_heads * model_info.head_dim
    gathered = max(model_info.max_model_len + block_size, MIN_GATHERED_TOKENS) * key_value * item
    scores = QUERY_TILE * model_info.num_heads * model_info.max_model_len * (2 * 4 + 2 * item)
    return gathered + scores
