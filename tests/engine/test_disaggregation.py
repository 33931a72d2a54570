"""What --prefill-replicas and --decode-replicas mean, and what they are not combined with."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.disaggregation import DECODE, PREFILL, num_transfer_blocks, role_of
from engine.errors import ConfigError
from engine.kv_transfer import missing_places, num_shared_blocks
from engine.messages import Ready
from engine.ray_replicas import check_equal

BOTH = {"prefill_replicas": 2, "decode_replicas": 1}


def config(**fields: Any) -> EngineConfig:
    return EngineConfig(model="m", **fields)


def test_the_first_replicas_compute_prompts():
    assert [role_of(config(**BOTH, replica=number)) for number in range(3)] == [PREFILL, PREFILL, DECODE]
    assert config(**BOTH).data_parallel_size == 3
    assert config(**BOTH, data_parallel_size=3).data_parallel_size == 3
    assert EngineConfig(**config(**BOTH).describe()) == config(**BOTH)
    assert role_of(config(data_parallel_size=2)) == ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prefill_replicas": 1}, r"--prefill-replicas \(1\) and --decode-replicas \(0\) must both be at least 1"),
        ({"decode_replicas": 2}, r"--prefill-replicas \(0\) and --decode-replicas \(2\)"),
        ({"prefill_replicas": -1, "decode_replicas": 2}, "must both be at least 1"),
        ({**BOTH, "data_parallel_size": 2}, "--dp 2 is not the sum of --prefill-replicas 2 and --decode-replicas 1"),
        ({**BOTH, "replica": 3}, "replica must be below"),
        ({**BOTH, "enable_prefix_caching": False}, "leave out --no-enable-prefix-caching"),
        ({**BOTH, "device": "sim:h100"}, "simulated hardware has no KV blocks"),
        ({**BOTH, "pipeline_parallel_size": 2}, "use --tp in place of --pp"),
        ({**BOTH, "ablate": ("no-run-ahead",)}, "leave out --ablate"),
        ({**BOTH, "engine": "v0"}, "--engine v0"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_flag(fields: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        config(**fields)


def test_replicas_whose_blocks_differ_can_not_exchange_them():
    ready = Ready("/m", "cpu", "float32", 320, 128, 4, 64, 16, 9, True, kernels="avx2", kv_layout="a")
    check_equal([ready, ready])
    with pytest.raises(ConfigError, match="different files of the model: copy them"):
        check_equal([ready, msgspec.structs.replace(ready, kv_layout="b")])
    with pytest.raises(ConfigError, match="with avx2 in float32 and avx512 in float32: give --kernels torch"):
        check_equal([ready, msgspec.structs.replace(ready, kv_layout="b", kernels="avx512")])
    with pytest.raises(ConfigError, match="room for requests of 64 and 128 tokens: give --max-model-len 64"):
        check_equal([ready, msgspec.structs.replace(ready, max_model_len=64)])


def test_one_prompt_always_fits_in_transfer():
    assert num_transfer_blocks(800, 10) == 100
    assert num_transfer_blocks(80, 60) == 60


@given(st.integers(1, 200), st.sampled_from([1, 4, 16]), st.integers(0, 20), st.integers(0, 40))
def test_a_group_with_a_window_lacks_only_what_the_next_token_attends_to(
    tokens: int, size: int, window: int, first: int
):
    end = num_shared_blocks(tokens, size)
    first = min(first, end)
    assert end * size < tokens, "at least the last token is computed"
    places = missing_places((0, window), size, first, end)
    assert [number for group, number in places if group == 0] == list(range(first, end))
    attended = {position // size for position in range(max(0, end * size - window + 1), end * size)}
    if not window:
        attended = set(range(end))
    found = [number for group, number in places if group == 1]
    assert set(found) >= {number for number in attended if number >= first}
    assert found == sorted(found)
    assert len(found) <= len(attended) + 1
