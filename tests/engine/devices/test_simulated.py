"""Named hardware as a device: its memory, vLLM's defaults, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from engine.config import EngineConfig
from engine.data import datasets_folder
from engine.devices import machine_for
from engine.devices.machine import Defaults
from engine.devices.simulated import SimulatedMachine
from engine.engine_plan import plan_engine
from engine.errors import ConfigError
from engine.hardware.profile_file import write_description
from tests.engine.hardware.test_profile_file import DEFAULTS, description
from tests.tiny import write_tiny


def configure(device: str = "sim:h100", **options: Any) -> EngineConfig:
    return EngineConfig(model="llama-3.1-8b", device=device, **options)


def test_memory_and_description() -> None:
    config = configure(tensor_parallel_size=4)
    machine = machine_for(config)
    assert machine.available_memory() == 4 * machine_for(configure()).available_memory() == 4 * 84_900_000_000
    assert machine.describe(config) == "sim:h100 (simulated: 4 x NVIDIA H100 SXM 80 GB)"
    assert "random" in machine.warnings(config)[0]
    assert machine.environment(0) == {}


def test_a_description_may_be_a_file() -> None:
    path = datasets_folder() / "hardware" / "a100.yaml"
    machine = machine_for(configure(f"sim:{path}"))
    assert isinstance(machine, SimulatedMachine)
    assert machine.hardware.title == "NVIDIA A100 SXM 80 GB"


def test_defaults_are_those_of_vllm() -> None:
    found = {
        (device, engine): machine_for(configure(device, engine=engine)).defaults
        for device in ("sim:h100", "sim:a100")
        for engine in ("v1", "v0")
    }
    sizes = {key: (one.max_num_seqs, one.max_num_batched_tokens) for key, one in found.items()}
    assert sizes == {
        ("sim:h100", "v1"): (1024, 8192),
        ("sim:a100", "v1"): (256, 2048),
        ("sim:h100", "v0"): (256, 2048),
        ("sim:a100", "v0"): (256, 2048),
    }
    assert {(one.block_size, one.memory_utilization) for one in found.values()} == {(16, 0.9)}


@pytest.mark.parametrize(
    ("device", "options", "message"),
    [
        ("sim:h1000", {}, "no such hardware; known are a100, b200, h100, h200"),
        ("sim:a100", {"quantization": "fp8"}, "A100 SXM 80 GB has no products in fp8: leave it out"),
        ("sim:a100", {"quantization": "int8"}, "it has times for bfloat16$"),
        ("sim:h100", {"quantization": "int4"}, "it has times for bfloat16, or fp8"),
        ("sim:a100", {"kv_cache_dtype": "fp8"}, "A100 SXM 80 GB has no times for it"),
        ("sim:h100", {"kv_cache_dtype": "int8"}, "it has times for auto or fp8"),
        ("sim:h100", {"tensor_parallel_size": 3}, "--tp 3: .* has times of all-reduces for 1, 2, 4, 8 ranks"),
        ("sim:h100", {"speculative": "ngram"}, "--speculative ngram does not work"),
        ("sim:h100", {"deterministic": True}, "--deterministic does not work"),
        ("sim:h100", {"kernels": "triton"}, "--kernels triton does not work"),
        ("sim:h100", {"adapters": (("a", "b"),)}, "--lora does not work"),
        ("sim:h100", {"tile_table": "t"}, "--tile-table needs the Triton kernels"),
    ],
)
def test_what_has_no_times_is_refused(device: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        machine_for(configure(device, **options))


def test_v0_with_ranks_is_simulated() -> None:
    assert isinstance(machine_for(configure(engine="v0", tensor_parallel_size=4)), SimulatedMachine)


# Tokens in the KV cache of vLLM on an H100 NVL (93.1 GiB), with 1,024 running requests and 4,096 tokens per step.
PUBLISHED = {"llama-3.1-8b": 542_960, "qwen3-8b": 478_560, "qwen3-14b": 350_304, "qwen3-32b": 81_648}


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_kv_cache_is_that_of_vllm(model: str, tmp_path: Path) -> None:
    description = (datasets_folder() / "hardware" / "h100.yaml").read_text()
    file = tmp_path / "h100-nvl.yaml"
    file.write_text(description.replace("{value: 84.9,", f"{{value: {93.1 * 2**30 / 1e9:.2f},"))
    config = EngineConfig(model=model, device=f"sim:{file}", max_num_batched_tokens=4096, max_model_len=8192)
    resolved = plan_engine(config).resolution.config
    assert resolved.num_blocks * resolved.block_size == pytest.approx(PUBLISHED[model], rel=0.01)


def test_a_machine_that_was_measured_keeps_its_defaults_and_is_doubted_if_it_was_busy(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    write_description(path, description(busy=0.5))
    config = EngineConfig(model="llama-3.1-8b", device=f"sim:{path}")
    machine = SimulatedMachine(config)
    assert machine.defaults == Defaults(**structs.asdict(DEFAULTS))
    assert "others used 50% of the cores" in machine.warnings(config)[1]


def test_the_kv_cache_of_a_measured_cpu_is_that_of_its_engine(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    write_description(path, description())
    options: dict[str, Any] = {
        "model": write_tiny(tmp_path), "dtype": "bfloat16", "max_model_len": 4096, "max_num_seqs": 96,
        "max_num_batched_tokens": 112,
    }  # fmt: skip
    memory = 64 << 20  # less than all requests could use
    simulated = plan_engine(EngineConfig(device=f"sim:{path}", **options), memory)
    real = plan_engine(EngineConfig(device="cpu", load_format="dummy", **options), memory)
    lines = [{line.what: line.bytes for line in one.resolution.memory} for one in (simulated, real)]
    assert lines[0]["workspace"] == lines[1]["workspace"]
    assert lines[0]["KV cache"] == pytest.approx(lines[1]["KV cache"], rel=0.01)
    assert lines[0]["KV cache"] < memory // 2
    config = simulated.config
    assert SimulatedMachine(config).available_memory() == pytest.approx(8 << 30, rel=1e-3)


def test_replicas_that_would_share_the_cores_of_a_measured_cpu_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    write_description(path, description())
    with pytest.raises(ConfigError, match=r"--dp 2 does not work on sim:.*mine.yaml: replicas .* share its cores"):
        machine_for(configure(f"sim:{path}", data_parallel_size=2))
    write_description(path, description(device="cuda"))
    assert machine_for(configure(f"sim:{path}", data_parallel_size=2)).available_memory() > 0
    assert machine_for(configure(data_parallel_size=2)).available_memory() == 84_900_000_000
