"""What pipeline stages (`--pp`) don't work with; each refusal names the flag to change."""

from collections.abc import Sequence
from typing import Protocol

from engine.errors import ConfigError


class StageOptions(Protocol):
    """The fields of `engine.config.EngineConfig` that matter to pipeline stages."""

    @property
    def pipeline_parallel_size(self) -> int: ...

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
        "--engine v0": ("it does not keep several steps in flight", config.engine == "v0"),
        "--ablate driver-broadcast": ("each stage keeps the state of requests", "driver-broadcast" in config.ablate),
        "--ablate full-state": ("each stage keeps the state of requests", "full-state" in config.ablate),
        f"--device {config.device}": ("simulated hardware has no stages", bool(config.simulated)),
    }
    for flag, (reason, given) in refused.items():
        if given:
            raise ConfigError(f"--pp {stages} does not work with {flag}: {reason}; use --tp, or leave out {flag}")


def check_stages_on(config: StageOptions, device: str) -> None:
    """Raise ConfigError if the device does not work with the number of pipeline stages.

    `device`: torch's type of it; empty: the CPU.
    """
    stages = config.pipeline_parallel_size
    if stages > 1 and device:
        raise ConfigError(f"--pp {stages} works on the CPU only: use --tp, or --device cpu")
