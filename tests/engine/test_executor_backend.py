"""Where ranks may run, and what is refused there."""

from typing import Any

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError

RAY = {"distributed_executor_backend": "ray"}


def config(**options: Any) -> EngineConfig:
    return EngineConfig(**{"model": "m", "tensor_parallel_size": 2, **options})


def test_ranks_run_on_this_machine_unless_ray_is_asked_for() -> None:
    assert config().distributed_executor_backend == "mp"
    assert config(distributed_executor_backend="uni").distributed_executor_backend == "mp"
    assert config(**RAY).distributed_executor_backend == "ray"
    roles = config(**RAY, tensor_parallel_size=1, prefill_replicas=1, decode_replicas=2)
    assert roles.data_parallel_size == 3
    assert config(**RAY, tensor_parallel_size=1, data_parallel_size=2, kv_spill="host=1GiB").data_parallel_size == 2
    assert config(**RAY, data_parallel_size=2, distribute_weights=True).num_ranks == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"distributed_executor_backend": "slurm"},
            "--distributed-executor-backend must be one of mp, ray, not 'slurm'",
        ),
        ({"ray_address": "10.0.0.1:6379"}, "^--ray-address needs --distributed-executor-backend ray$"),
        ({"distribute_weights": True}, "^--distribute-weights needs --distributed-executor-backend ray$"),
        ({**RAY, "tensor_parallel_size": 1}, "give one of these flags"),
        ({**RAY, "device": "sim:h100"}, "does not work with simulated hardware"),
        ({**RAY, "ray_address": "ray://10.0.0.1:10001"}, "can't be a Ray client; run it on a node of the cluster"),
    ],
)
def test_what_does_not_work_names_its_flag(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**options)


def test_a_rank_shares_the_cores_of_its_host_with_the_ranks_there() -> None:
    """Ranks 0 to 2 on one host, 3 to 7 on another: rank 4 is the second of five."""
    rank = config(**RAY | {"tensor_parallel_size": 8, "host_ranks": (3, 5)})
    assert (rank.total_ranks, rank.first_rank + 4) == (5, 1)
    assert config(**RAY).total_ranks == 2
