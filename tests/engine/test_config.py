"""What an EngineConfig refuses, and what its ablations mean."""

import json
from typing import Any

import pytest

from engine.config import ABLATIONS, CHUNKING, EngineConfig
from engine.errors import ConfigError


def config(**fields: Any) -> EngineConfig:
    return EngineConfig(model="m", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"engine": "v1", "num_scheduler_steps": 8}, "--num-scheduler-steps is an option of V0: V1 always schedules a"),
        ({"engine": "v1", "enable_chunked_prefill": True}, "--enable-chunked-prefill is an option of V0"),
        ({"engine": "v1", "enable_chunked_prefill": False}, "--ablate no-chunking"),
        ({"num_scheduler_steps": 8, "ablate": ("watermark",)}, "--engine v0 already switches off all of them"),
        ({"num_scheduler_steps": 8, "enable_chunked_prefill": True}, "exclude each other"),
        ({"max_model_len": 0}, "--max-model-len must be at least 1, or auto, not 0"),
        ({"max_model_len": -2}, "--max-model-len must be at least 1, or auto, not -2"),
        ({"served_model_name": ("a", "")}, "--served-model-name must not be empty"),
        (
            {"served_model_name": ("a", "b"), "adapters": (("b", "/p"),)},
            "must be unique and differ from the model's name",
        ),
        ({"hf_overrides": "{"}, "--hf-overrides is not valid JSON"),
        ({"hf_overrides": "[1]"}, "--hf-overrides must be a JSON object"),
        ({"dtype": "int8"}, "--dtype must be one of auto, bfloat16"),
        ({"engine": "v0", "num_scheduler_steps": 8, "enable_chunked_prefill": True}, "exclude each other"),
        ({"engine": "v0", "num_scheduler_steps": 0}, "--num-scheduler-steps must be at least 1"),
        ({"engine": "v0", "ablate": ("watermark",)}, "already switches off all of them"),
        ({"ablate": ("chunking",)}, "--ablate must be one of no-chunking, prefill-first"),
        ({"ablate": ("driver-broadcast",)}, "--ablate driver-broadcast needs --tp 2 or more"),
        ({"engine": "v2"}, "--engine must be one of v1, v0"),
        ({"data_parallel_size": 0}, "--dp must be at least 1, not 0"),
        ({"data_parallel_size": 2, "replica": 2}, "replica must be below --dp"),
        ({"routing": "nearest"}, "--routing must be one of prefix, least-loaded, random"),
        ({"scheduling_policy": "lifo"}, "--scheduling-policy must be one of fcfs, priority"),
    ],
)
def test_what_contradicts_itself_is_refused_with_the_flag(fields: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        config(**fields)


def test_v0_is_every_removal_and_chunked_v0_keeps_chunks():
    assert config().ablations == frozenset()
    assert config(ablate=["watermark", "full-state"]).ablations == {"watermark", "full-state"}
    alone = set(ABLATIONS) - {"driver-broadcast"}  # which takes several ranks
    assert config(engine="v0").ablations == alone
    assert config(engine="v0", enable_chunked_prefill=False).ablations == alone
    assert config(engine="v0", enable_chunked_prefill=True).ablations == alone - set(CHUNKING)
    assert config(engine="v0", tensor_parallel_size=2).ablations == set(ABLATIONS)
    assert config(ablate=("driver-broadcast",), tensor_parallel_size=2).ablations == {"driver-broadcast"}


@pytest.mark.parametrize("fields", [{"num_scheduler_steps": 8}, {"enable_chunked_prefill": True}])
def test_an_option_of_v0_chooses_v0(fields: dict[str, Any]):
    """As vLLM 0.8 falls back to V0 where one of the two is given."""
    found = config(**fields)
    assert found.engine == "v0"
    assert found.ablations == config(engine="v0", **fields).ablations
    assert [*found.v0_options] == ["--" + name.replace("_", "-") for name in fields]
    assert "runs as --engine v0" in found.fallback_note()
    assert config().engine == "v1"


def test_one_spelling_for_what_can_be_said_in_several():
    assert (config(dtype="half").dtype, config(dtype="float").dtype) == ("float16", "float32")
    assert config(kv_cache_dtype="auto").kv_cache_dtype is None
    assert config(kv_cache_dtype="fp8_e4m3").kv_cache_dtype == "fp8"
    found = config(quantization="awq_marlin")
    assert (found.quantization, found.stored_quantization) == (None, "awq")
    assert config(served_model_name="a").names == ("a",)
    assert config(served_model_name=["a", "b", "a"]).names == ("a", "b")
    assert config(served_model_name=["a", "b"]).name == "a"
    assert config().names == ("m",)
    assert config(hf_overrides='{"rope_theta": 5}').hf_overrides == {"rope_theta": 5}


def test_ranks_are_counted_over_all_replicas():
    assert (config().total_ranks, config().first_rank) == (1, 0)
    third = config(data_parallel_size=4, tensor_parallel_size=3, replica=2)
    assert (third.total_ranks, third.first_rank) == (12, 6)


def test_it_survives_the_way_to_another_process():
    asked = config(
        ablate=("no-run-ahead",), served_model_name=("a", "b"), hf_overrides={"rope_theta": 5}, quantization="gptq"
    )
    assert EngineConfig(**json.loads(json.dumps(asked.describe()))) == asked
    fallen_back = config(num_scheduler_steps=4)
    assert EngineConfig(**json.loads(json.dumps(fallen_back.describe()))) == fallen_back
