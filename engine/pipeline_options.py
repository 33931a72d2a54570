"""What pipeline stages (`--pp`) don't work with; each refusal names the flag to change."""

from collections.abc import Sequence
from typing import Protocol

from engine.errors import ConfigError


class StageOptions(Protocol):
    """The fields of `engine.config.EngineConfig` that matter to pipeline stages."""

    @property
    def model(self) -> str: ...

    @property
    def pipeline_parallel_size(self) -> int: ...

    @property
    def speculative(self) -> str | None: ...

    @property
    def adapters(self) -> Sequence[tuple[str, str]]: ...

    @property
    def kv_spill(self) -> str | None: ...

    @property
    def engine(self) -> str | None: ...

    @property
    def ablate(self) -> Sequence[str]: ...

    @property
    def device(self) -> str: ...

    @property
    def simulated(self) -> str: ...


def check_stages(config: StageOptions) -> None:
    """Raise ConfigError if an option does not work with the number of pipeline stages."""
    stages = config.pipeline_parallel_size
    if stages == 1:
        return
    refused = {
        "--speculative": ("it proposes draft tokens after each step", bool(config.speculative)),
        "--lora": ("adapters are loaded by ranks that have all layers", bool(config.adapters)),
        "--kv-spill": ("the KV blocks of stages differ in size", config.kv_spill is not None),
        "--engine v0": ("it does not keep several steps in flight", config.engine == "v0"),
        "--ablate driver-broadcast": ("each stage keeps the state of requests", "driver-broadcast" in config.ablate),
        "--ablate full-state": ("each stage keeps the state of requests", "full-state" in config.ablate),
        f"--device {config.device}": ("simulated hardware has no stages", bool(config.simulated)),
    }
    for flag, (reason, given) in refused.items():
        if given:
            raise ConfigError(f"--pp {stages} does not work with {flag}: {reason}; use --tp, or leave out {flag}")


def check_stages_of_model(config: StageOptions, *, takes_inputs: bool, device: str) -> None:
    """Raise ConfigError if the model or the device does not work with the number of pipeline stages.

    Args:
        takes_inputs: whether the model takes images, audio or video.
        device: torch's type of the device; empty: the CPU.
    """
    stages = config.pipeline_parallel_size
    if stages > 1 and takes_inputs:
        raise ConfigError(
            f"--pp {stages} does not work with {config.model}, which takes images, audio or video: use --tp"
        )
    if stages > 1 and device:
        raise ConfigError(f"--pp {stages} works on the CPU only: use --tp, or --device cpu")
