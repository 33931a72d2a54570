"""The values of `--distributed-executor-backend`, and what works with them."""

from typing import Protocol

from engine.errors import ConfigError

MP, RAY = "mp", "ray"
EXECUTOR_BACKENDS: tuple[str, ...] = (MP, RAY)
BACKEND_ALIASES = {"uni": MP}  # vLLM's name for a single rank in the EngineCore's process

BACKEND = "--distributed-executor-backend"


class BackendOptions(Protocol):
    """The fields of `engine.config.EngineConfig` that matter to the backend."""

    @property
    def distributed_executor_backend(self) -> str: ...

    @property
    def ray_address(self) -> str | None: ...

    @property
    def distribute_weights(self) -> bool: ...

    @property
    def kv_spill(self) -> str | None: ...

    @property
    def simulated(self) -> str: ...

    @property
    def num_ranks(self) -> int: ...

    @property
    def data_parallel_size(self) -> int: ...


def check_backend(config: BackendOptions) -> None:
    """Raise ConfigError for options that don't work with the backend."""
    if config.distributed_executor_backend != RAY:
        for flag, given in (("--ray-address", config.ray_address), ("--distribute-weights", config.distribute_weights)):
            if given:
                raise ConfigError(f"{flag} needs {BACKEND} {RAY}")
        return
    if config.simulated:
        raise ConfigError(f"{BACKEND} {RAY} does not work with simulated hardware, which runs in one process")
    if config.num_ranks == 1 and config.data_parallel_size == 1:
        raise ConfigError(
            f"{BACKEND} {RAY} divides a model over the nodes of a Ray cluster (--tp, --pp), or runs replicas there "
            "(--dp): give one of these flags"
        )
    if (config.ray_address or "").startswith("ray://"):
        raise ConfigError(
            f"--ray-address {config.ray_address}: the engine can't be a Ray client; run it on a node of the cluster, "
            "and give HOST:PORT"
        )
