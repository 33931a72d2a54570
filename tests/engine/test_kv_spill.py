"""The value of --kv-spill."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kv_spill import KVSpill, blocks_per_replica, parse_kv_spill


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("host=4GiB", KVSpill(4 << 30)),
        ("host=500MB", KVSpill(500_000_000)),
        ("host=4GiB,disk=/path:50GiB", KVSpill(4 << 30, "/path", 50 << 30)),
        ("host=1g, disk=/a:b/c,d:8k", KVSpill(10**9, "/a:b/c,d", 8000)),
    ],
)
def test_sizes_and_paths_are_read(text: str, expected: KVSpill) -> None:
    assert parse_kv_spill(text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must begin with host=SIZE"),
        ("4GiB", "must begin with host=SIZE"),
        ("disk=/path:50GiB", "must begin with host=SIZE"),
        ("host=", "host=: '' is not a valid size"),
        ("host=many", "host=: 'many' is not a valid size"),
        ("host=0", "host= must be at least 1 byte"),
        ("host=1GiB,", "takes disk=PATH:SIZE after host="),
        ("host=1GiB,disk=/path", "takes disk=PATH:SIZE after host="),
        ("host=1GiB,disk=:5GiB", "takes disk=PATH:SIZE after host="),
        ("host=1GiB,disk=/path:lots", "disk=: 'lots' is not a valid size"),
        ("host=1GiB,disk=/a:1GiB,disk=/b:1GiB", "takes one disk="),
        ("host=1GiB,tape=/path:5GiB", "takes disk=PATH:SIZE after host="),
    ],
)
def test_what_is_wrong_is_said(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"--kv-spill {said}"):
        EngineConfig(model="m", kv_spill=text)


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = parse_kv_spill(text)
    except ConfigError:
        return
    assert found.host_bytes > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "sim:h100"}, "does not work with --device sim"),
        ({"enable_prefix_caching": False}, "needs prefix caching"),
        ({"ablate": ("no-prefix-cache",)}, "needs prefix caching"),
        ({"ablate": ("driver-broadcast",), "tensor_parallel_size": 2}, "does not work with --ablate driver-broadcast"),
        ({"engine": "v0"}, "needs prefix caching"),
    ],
)
def test_options_that_exclude_it(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=f"--kv-spill {said}"):
        EngineConfig(model="m", kv_spill="host=1GiB", **options)  # type: ignore[arg-type]


def test_replicas_share_the_size() -> None:
    assert blocks_per_replica(100, 1, 10, "host=") == 10
    assert blocks_per_replica(100, 3, 10, "host=") == 3
    with pytest.raises(ConfigError, match="host= is too small: a KV block has 10 bytes for each of 11 replicas"):
        blocks_per_replica(100, 11, 10, "host=")
