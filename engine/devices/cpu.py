"""The CPU and the host's memory as a device."""

from collections.abc import Sequence
from pathlib import Path

from engine.config import EngineConfig
from engine.devices.machine import (
    Defaults,
    StepTokens,
    bytes_per_token,
    default_step_tokens,
    gathered_attention_bytes,
    refuse_tile_table,
    replica_flags,
)
from engine.errors import ConfigError
from engine.host import available_memory, cores, threads_per_rank
from engine.kernels.cpu import build
from engine.model.model_info import ITEMSIZE, QUANTIZED_BYTES, ModelInfo

# On AMX tiles prompts are computed faster in longer steps, since each step reads all weights: 890 and 938 output
# tokens/s with 512 tokens, 716 to 816 with 128 (128/128 x 64, SmolLM2-135M, 2 cores). Running requests wait for a step
# as long as it takes.
MAX_STEP_TOKENS, STEP_MULTIPLE = 512, 64
STEP_SECONDS = 0.15
TILE_ISA = "amx"
TILE_OPERATIONS = 0.35e12  # per second and thread, 2 for a weight and a token: a prompt of 512 tokens in 150 ms
SAMPLER_ROWS = 32  # rows of logits that the sampler converts to float32 at a time
# PyTorch computes a dtype at full speed if the CPU has one of these features.
FAST_DTYPES = {"bfloat16": {"avx512_bf16", "amx_bf16", "bf16"}, "float16": {"amx_fp16", "avx512_fp16", "fphp"}}


class CpuMachine:
    """Implements `engine.devices.machine.Machine`.

    Args:
        notes: warnings about the choice of this device.

    Raises ConfigError for kernels of another device.
    """

    torch_type = ""
    kernels = "auto"
    tile_table = ""
    simulated = ""
    defaults = Defaults(
        # Steps of 112 tokens compute as many tokens per second as longer ones, and running requests wait less for them:
        # 110 ms beside prompts of 1,500 tokens (SmolLM2-135M, 2 cores), in place of 150 ms for steps of 144.
        max_num_seqs=96,
        max_num_batched_tokens=112,
        min_chunk=16,
        block_size=32,
        memory_utilization=0.5,  # all programs share the host's memory
    )

    def __init__(self, config: EngineConfig, notes: Sequence[str] = ()):
        if config.kernels == "triton":
            raise ConfigError("--kernels triton does not work on the CPU: use auto, or --device cuda")
        refuse_tile_table(config, "on the CPU")
        self._notes = list(notes)
        self._replicas = config.data_parallel_size

    def available_memory(self) -> int:
        return available_memory() // self._replicas

    def environment(self, replica: int) -> dict[str, str]:  # noqa: ARG002
        return {}

    def workspace(self, model_info: ModelInfo, max_num_seqs: int, max_num_batched_tokens: int, block_size: int) -> int:
        return cpu_workspace(model_info, max_num_seqs, max_num_batched_tokens, block_size)

    def step_tokens(self, config: EngineConfig, model_info: ModelInfo) -> StepTokens:
        """On tiles as many as take STEP_SECONDS."""
        if not _uses_tiles(config, model_info.dtype):
            return default_step_tokens(self.defaults)
        each = QUANTIZED_BYTES[config.quantization] if config.quantization else ITEMSIZE[model_info.dtype]
        per_token = 2 * model_info.weight_bytes / each
        threads = config.num_ranks * threads_per_rank(config.total_ranks, cores())
        fitting = int(STEP_SECONDS * TILE_OPERATIONS * threads / per_token) // STEP_MULTIPLE * STEP_MULTIPLE
        least = self.defaults.max_num_batched_tokens
        if fitting <= least:
            return default_step_tokens(self.defaults)
        return StepTokens(min(fitting, MAX_STEP_TOKENS), f"at most {1000 * STEP_SECONDS:.0f} ms on AMX tiles")

    def encoder_dtype(self, dtype: str) -> str:
        return encoder_dtype(dtype)

    def adapt(self, config: EngineConfig) -> EngineConfig:
        if config.kv_cache_dtype == "fp8":
            raise ConfigError("--kv-cache-dtype fp8 does not work on the CPU: use int8")
        return config.checks_stored()

    def describe(self, config: EngineConfig) -> str:
        ranks, threads = config.num_ranks, threads_per_rank(config.total_ranks, cores())
        each = f"{threads} thread{'s' if threads > 1 else ''}"
        return f"cpu ({each})" if ranks == 1 else f"cpu ({ranks} ranks of {each})"

    def warnings(self, config: EngineConfig) -> list[str]:
        if config.total_ranks <= cores():
            return self._notes
        ranks = {"--tp": config.tensor_parallel_size, "--pp": config.pipeline_parallel_size}
        flags = [f"{flag} {count}" for flag, count in ranks.items() if count > 1]
        flags += [f"{flag} {count}" for flag, count in replica_flags(config).items()]
        what = "ranks" if config.num_ranks > 1 else "replicas"
        return [
            *self._notes,
            f"{' '.join(flags)} on {cores()} core{'s' if cores() > 1 else ''}: {what} share cores; use fewer",
        ]


def cpu_workspace(model_info: ModelInfo, max_num_seqs: int, max_num_batched_tokens: int, block_size: int) -> int:
    """Of a step on the CPU: activations, logits, and the generic backend's gathered keys and scores."""
    logits = (
        max_num_seqs * model_info.vocab_size * ITEMSIZE[model_info.dtype]
        + min(max_num_seqs, SAMPLER_ROWS) * model_info.vocab_size * 4 * 4
    )
    activations = max_num_batched_tokens * bytes_per_token(model_info)
    return activations + logits + gathered_attention_bytes(model_info, block_size)


def _uses_tiles(config: EngineConfig, dtype: str) -> bool:
    """Whether the C++ kernels, if they support the model, multiply on AMX tiles."""
    isa = config.kernels if config.kernels != "auto" else next(iter(build.supported_isas()), "")
    return isa == TILE_ISA and dtype == "bfloat16"


def pytorch_warnings(dtype: str) -> list[str]:
    """What the user should know if PyTorch computes the model in this dtype, and not the C++ kernels."""
    if encoder_dtype(dtype) == dtype:
        return []
    return [f"PyTorch computes {dtype} slowly on this CPU: --dtype float32 is faster if there is enough memory"]


def encoder_dtype(dtype: str) -> str:
    """The dtype of the encoders of a model of this dtype: float32 on a CPU on which PyTorch computes it slowly."""
    features = _features()
    return dtype if dtype not in FAST_DTYPES or features is None or FAST_DTYPES[dtype] & features else "float32"


def _features() -> set[str] | None:
    """Features of the CPU; None if they can't be read."""
    try:
        return set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return None
