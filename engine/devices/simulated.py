"""Named hardware that is simulated (`--device sim:NAME`): its memory and defaults, as an engine on the real one has."""

from msgspec import structs

from engine.config import EngineConfig
from engine.devices.cpu import cpu_workspace
from engine.devices.cuda import RUNTIME_BYTES
from engine.devices.machine import Defaults, StepTokens, bytes_per_token, default_step_tokens, refuse_tile_table
from engine.errors import ConfigError
from engine.hardware.accuracy import unvalidated
from engine.hardware.description import Hardware, read_hardware
from engine.hardware.profiled import profile_warnings
from engine.model.model_info import ModelInfo

# Defaults of vLLM: V1's on GPUs of the size of an H100; V1's on others, and V0's on all.
LARGE = Defaults(max_num_seqs=1024, max_num_batched_tokens=8192, min_chunk=256, block_size=16, memory_utilization=0.9)
SMALL = Defaults(max_num_seqs=256, max_num_batched_tokens=2048, min_chunk=256, block_size=16, memory_utilization=0.9)
LARGE_BYTES = 70e9
# Of the sampler for each logit. With it, the KV cache of four published starts of vLLM on an H100 NVL is met within 1 %
# (`tests/engine/devices/test_simulated.py`).
LOGIT_BYTES = 12


class SimulatedMachine:
    """Implements `engine.devices.machine.Machine`. Raises ConfigError for options that have no known times."""

    torch_type = ""
    kernels = "simulated"
    tile_table = ""

    def __init__(self, config: EngineConfig):
        self.hardware = read_hardware(config.simulated)
        self.simulated = self.hardware.title
        self._ranks = config.tensor_parallel_size
        refuse_tile_table(config, f"on {config.device}")
        _check(config, self.hardware)
        self.defaults = defaults_of(self.hardware, config.engine)

    def available_memory(self) -> int:
        return self._ranks * self.hardware.memory_bytes

    def environment(self, replica: int) -> dict[str, str]:  # noqa: ARG002
        return {}

    def workspace(self, model_info: ModelInfo, max_num_seqs: int, max_num_batched_tokens: int, block_size: int) -> int:
        """What the engine reserves on a CPU; else what vLLM finds in its largest step, activations or logits."""
        if self.hardware.is_cpu:
            return cpu_workspace(model_info, max_num_seqs, max_num_batched_tokens, block_size)
        activations = max_num_batched_tokens * bytes_per_token(model_info)
        return RUNTIME_BYTES + max(activations, max_num_seqs * model_info.vocab_size * LOGIT_BYTES)

    def step_tokens(self, config: EngineConfig, model_info: ModelInfo) -> StepTokens:  # noqa: ARG002
        return default_step_tokens(self.defaults)

    def encoder_dtype(self, dtype: str) -> str:
        return dtype

    def adapt(self, config: EngineConfig) -> EngineConfig:
        return config

    def describe(self, config: EngineConfig) -> str:
        count = f"{self._ranks} x " if self._ranks > 1 else ""
        return f"{config.device} (simulated: {count}{self.hardware.title})"

    def warnings(self, config: EngineConfig) -> list[str]:
        device = f"--device {config.device}"
        found = [f"{device} is simulated: tokens are random, and times are those of a latency model"]
        if note := unvalidated(self.hardware, config.engine):
            found.append(f"{device}: {note}")
        return [*found, *profile_warnings(config.simulated, self.hardware)]


def defaults_of(hardware: Hardware, engine: str | None) -> Defaults:
    """The values of options that were not given, of an engine: v1, v0, or None for the default, v1."""
    if hardware.defaults is not None:
        return Defaults(**structs.asdict(hardware.defaults))
    if engine == "v0":
        return SMALL
    # vLLM's condition: an A100, which multiplies no fp8, keeps the smaller values whatever its memory.
    large = hardware.memory_bytes >= LARGE_BYTES and hardware.peak_tflops.fp8 is not None
    return LARGE if large else SMALL


def _check(config: EngineConfig, hardware: Hardware) -> None:
    """Raise ConfigError for options that the latency model doesn't know, with what works."""
    device = config.device
    if config.kernels != "auto":
        raise ConfigError(f"--kernels {config.kernels} does not work on {device}, which has none: leave it out")
    if config.deterministic:
        raise ConfigError(f"--deterministic does not work on {device}, whose tokens are random: leave it out")
    if config.speculative:
        raise ConfigError(
            f"--speculative {config.speculative} does not work on {device}: how many draft tokens are accepted depends "
            "on texts, and its tokens are random: leave it out"
        )
    if config.adapters:
        raise ConfigError(f"--lora does not work on {device}: the latency model has no adapters: leave it out")
    if config.quantization not in (None, "fp8"):
        fp8 = ", or fp8" if hardware.gemm.fp8 is not None else ""
        raise ConfigError(
            f"--quantization {config.quantization} does not work on {device}: it has times for bfloat16{fp8}"
        )
    if config.quantization == "fp8" and hardware.gemm.fp8 is None:
        raise ConfigError(f"--quantization fp8: {hardware.title} has no products in fp8: leave it out")
    if config.kv_cache_dtype not in (None, "fp8"):
        fp8 = " or fp8" if hardware.attention.decode.fp8 is not None else ""
        raise ConfigError(
            f"--kv-cache-dtype {config.kv_cache_dtype} does not work on {device}: it has times for auto{fp8}"
        )
    if config.kv_cache_dtype == "fp8" and hardware.attention.decode.fp8 is None:
        raise ConfigError(f"--kv-cache-dtype fp8: {hardware.title} has no times for it: leave it out")
    if hardware.is_cpu and config.data_parallel_size > 1:
        raise ConfigError(
            f"--dp {config.data_parallel_size} does not work on {device}: replicas on one machine share its cores and "
            "its memory, and its description has times for one of them: leave it out"
        )
    ranks = config.tensor_parallel_size
    if ranks > 1 and ranks not in hardware.all_reduce.ranks:
        known = ", ".join(map(str, (1, *sorted(hardware.all_reduce.ranks))))
        raise ConfigError(f"--tp {ranks}: {hardware.title} has times of all-reduces for {known} ranks")
