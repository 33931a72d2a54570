"""A device type of torch other than the CPU and CUDA, as a device: xpu, mps, hpu."""

from engine.config import EngineConfig
from engine.devices.machine import (
    Defaults,
    StepTokens,
    activation_bytes,
    check_options,
    default_step_tokens,
    gathered_attention_bytes,
    refuse_quantized,
    refuse_tile_table,
    replica_flags,
)
from engine.devices.probe import DeviceFacts
from engine.errors import ConfigError
from engine.host import available_memory
from engine.model.model_info import ModelInfo


class TorchMachine:
    """Implements `engine.devices.machine.Machine`. Raises ConfigError for options that the device does not support."""

    kernels = "torch"
    tile_table = ""
    simulated = ""
    defaults = Defaults(
        max_num_seqs=128, max_num_batched_tokens=1024, min_chunk=64, block_size=32, memory_utilization=0.8
    )

    def __init__(self, config: EngineConfig, facts: DeviceFacts):
        self.torch_type: str = config.device
        if facts.error:
            raise ConfigError(f"--device {config.device}: {facts.error}: use --device cpu")
        check_options(config, self.torch_type, ("auto", "torch"))
        ranks = {"--tp": config.tensor_parallel_size} if config.tensor_parallel_size > 1 else {}
        for flag, count in (ranks | replica_flags(config)).items():
            raise ConfigError(f"{flag} {count} does not work on {config.device}: use --device cpu or cuda")
        refuse_quantized(config.checks_stored(), f"they run on cuda, not on {self.torch_type}")
        refuse_tile_table(config, f"on {self.torch_type}")
        self._facts = facts

    def available_memory(self) -> int:
        """The device's free memory, or the host's if the device does not tell, because it uses the host's."""
        return available_memory() if self._facts.free_bytes is None else self._facts.free_bytes

    def environment(self, replica: int) -> dict[str, str]:  # noqa: ARG002
        return {}

    def workspace(self, model_info: ModelInfo, max_num_seqs: int, max_num_batched_tokens: int, block_size: int) -> int:
        return activation_bytes(model_info, max_num_seqs, max_num_batched_tokens) + gathered_attention_bytes(
            model_info, block_size
        )

    def step_tokens(self, config: EngineConfig, model_info: ModelInfo) -> StepTokens:  # noqa: ARG002
        return default_step_tokens(self.defaults)

    def encoder_dtype(self, dtype: str) -> str:
        return dtype

    def adapt(self, config: EngineConfig) -> EngineConfig:
        return config.checks_stored()

    def describe(self, config: EngineConfig) -> str:  # noqa: ARG002
        return f"{self.torch_type} ({self._facts.name})" if self._facts.name else self.torch_type

    def warnings(self, config: EngineConfig) -> list[str]:  # noqa: ARG002
        return [f"--device {self.torch_type} has not been tested on hardware"]
