"""What an EngineConfig refuses, and what its removals mean."""

from typing import Any

import pytest

from engine.config import CHUNKING, REMOVALS, EngineConfig
from engine.errors import ConfigError


def config(**fields: Any) -> EngineConfig:
    return EngineConfig(model="m", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_scheduler_steps": 8}, "--num-scheduler-steps needs --engine v0: V1 plans each step while"),
        ({"enable_chunked_prefill": True}, "--enable-chunked-prefill needs --engine v0: V1 always"),
        ({"enable_chunked_prefill": False}, "--ablate no-chunking"),
        ({"engine": "v0", "num_scheduler_steps": 8, "enable_chunked_prefill": True}, "exclude each other"),
        ({"engine": "v0", "num_scheduler_steps": 0}, "--num-scheduler-steps must be at least 1"),
        ({"engine": "v0", "ablate": ("watermark",)}, "without all of them already"),
        ({"ablate": ("chunking",)}, "--ablate must be of no-chunking, prefill-first"),
        ({"ablate": ("driver-broadcast",)}, "--ablate driver-broadcast needs --tp 2 or more"),
        ({"engine": "v2"}, "--engine must be one of v1, v0"),
        ({"data_parallel_size": 0}, "--dp must be at least 1, not 0"),
        ({"data_parallel_size": 2, "replica": 2}, "replica 2 is none of the 2 of --dp"),
        ({"routing": "nearest"}, "--routing must be one of prefix, least-loaded, random"),
        ({"scheduling_policy": "lifo"}, "--scheduling-policy must be one of fcfs, priority"),
    ],
)
def test_what_contradicts_itself_is_refused_with_the_flag(fields: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        config(**fields)


def test_v0_is_every_removal_and_chunked_v0_keeps_chunks():
    assert config().removals == frozenset()
    assert config(ablate=["watermark", "full-state"]).removals == {"watermark", "full-state"}
    alone = set(REMOVALS) - {"driver-broadcast"}  # which takes several ranks
    assert config(engine="v0").removals == alone
    assert config(engine="v0", enable_chunked_prefill=False).removals == alone
    assert config(engine="v0", enable_chunked_prefill=True).removals == alone - set(CHUNKING)
    assert config(engine="v0", tensor_parallel_size=2).removals == set(REMOVALS)
    assert config(ablate=("driver-broadcast",), tensor_parallel_size=2).removals == {"driver-broadcast"}


def test_ranks_are_counted_over_all_replicas():
    assert (config().total_ranks, config().first_rank) == (1, 0)
    third = config(data_parallel_size=4, tensor_parallel_size=3, replica=2)
    assert (third.total_ranks, third.first_rank) == (12, 6)


def test_it_survives_the_way_to_another_process():
    asked = config(ablate=("no-run-ahead",))
    assert EngineConfig(**{**asked.describe(), "ablate": list(asked.ablate)}) == asked
