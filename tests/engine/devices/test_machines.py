"""The machine of `--device`, with made-up answers of the probe, and with the real one where there is no GPU."""

import json
import subprocess
import sys
from typing import Any

import pytest
from msgspec.structs import replace

from engine import devices
from engine.config import EngineConfig
from engine.devices import cuda, machine_for, probe
from engine.devices.cpu import CpuMachine
from engine.devices.cuda import CudaMachine
from engine.devices.machine import Machine
from engine.devices.probe import DeviceFacts
from engine.devices.torch_device import TorchMachine
from engine.errors import ConfigError
from engine.memory import resolve
from engine.replicas import start_cores
from tests.engine.test_memory import GIB, make_facts

H100 = DeviceFacts(name="NVIDIA H100 80GB HBM3", free_bytes=79 * GIB, capability=(9, 0), driver="CUDA 13.0")
OLD_GPU = DeviceFacts(name="Tesla V100-SXM2-16GB", free_bytes=15 * GIB, capability=(7, 0), driver="CUDA 12.4")
A100 = DeviceFacts(name="NVIDIA A100-SXM4-80GB", free_bytes=79 * GIB, capability=(8, 0), driver="CUDA 13.0")
AMD = DeviceFacts(name="AMD Instinct MI300X", free_bytes=190 * GIB, driver="ROCm 7.0")


def configure(**options: Any) -> EngineConfig:
    return EngineConfig(model="m", **options)


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch):
    """Sets what the probe answers, on a machine with a GPU build of PyTorch."""

    def set_answer(
        facts: DeviceFacts, *, triton: bool = True, missing: str = "", driver: tuple[int, int] = (13, 0)
    ) -> None:
        monkeypatch.setattr(probe, "ask", lambda _device, _ranks=1: facts)
        monkeypatch.setattr(probe, "torch_build", lambda: {"__version__": "2.13.0+cu130", "cuda": "13.0"})
        monkeypatch.setattr(probe, "driver_version", lambda: driver)
        monkeypatch.setattr(cuda, "_missing_software", lambda: missing)
        monkeypatch.setattr(cuda, "has_triton", lambda: triton)

    return set_answer


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_runs_triton_kernels(answer, device: str) -> None:
    answer(H100)
    config = configure(device=device)
    machine = machine_for(config)
    assert (machine.torch_type, machine.kernels) == ("cuda", "triton")
    assert machine.describe(config) == "cuda (NVIDIA H100 80GB HBM3, compute capability 9.0, CUDA 13.0)"
    assert machine.warnings(config) == ["--device cuda has not been tested on hardware"]


def test_a_gpu_without_a_compute_capability_runs_triton_kernels(answer) -> None:
    answer(AMD)
    machine = machine_for(configure())
    assert machine.kernels == "triton"
    assert machine.describe(configure()) == "cuda (AMD Instinct MI300X, ROCm 7.0)"


@pytest.mark.parametrize(
    ("facts", "triton", "reason"),
    [(OLD_GPU, True, "compute capability 7.0"), (H100, False, "triton is not installed")],
)
def test_without_triton_kernels_torch_is_used_and_said(answer, facts: DeviceFacts, triton: bool, reason: str) -> None:
    answer(facts, triton=triton)
    machine = machine_for(configure())
    assert (machine.torch_type, machine.kernels) == ("cuda", "torch")
    assert any(reason in line for line in machine.warnings(configure()))
    with pytest.raises(ConfigError, match=f"--kernels triton: .*{reason}.*--kernels torch"):
        machine_for(configure(kernels="triton"))


def test_torch_kernels_that_were_asked_for_need_no_warning(answer) -> None:
    answer(OLD_GPU)
    config = configure(kernels="torch")
    machine = machine_for(config)
    assert machine.kernels == "torch"
    assert not any("compute capability" in line for line in machine.warnings(config))


def test_a_driver_that_is_too_old(answer) -> None:
    answer(H100, driver=(12, 4))
    cause = (
        "the NVIDIA driver supports CUDA 12.4, too old for the installed PyTorch, which was built for CUDA 13.0 "
        "(install a newer driver)"
    )
    with pytest.raises(ConfigError) as caught:
        machine_for(configure(device="cuda"))
    assert str(caught.value) == f"--device cuda: {cause}: use --device cpu"
    machine = machine_for(configure())
    assert isinstance(machine, CpuMachine)
    assert f"{cause}: the model runs on the CPU" in machine.warnings(configure())


@pytest.mark.parametrize(
    ("build", "driver", "fits"),
    [
        ({"cuda": "13.0"}, (13, 2), True),
        ({"cuda": "13.2"}, (13, 0), True),  # the same major version
        ({"cuda": "12.8"}, (13, 0), True),
        ({"cuda": "13.0"}, (12, 9), False),
        ({"hip": "7.0"}, (0, 0), True),
    ],
)
def test_which_builds_a_driver_runs(build: dict[str, str], driver: tuple[int, int], fits: bool) -> None:
    assert (cuda.old_driver(build, lambda: driver) == "") == fits


def test_auto_does_not_ask_where_software_is_missing(answer) -> None:
    answer(H100, missing="no NVIDIA driver was found (libcuda.so.1)")
    machine = machine_for(configure())
    assert isinstance(machine, CpuMachine)
    assert machine.warnings(configure()) == []
    with pytest.raises(ConfigError, match="--device cuda: no NVIDIA driver was found"):
        machine_for(configure(device="cuda"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": "avx2"}, "--kernels avx2 does not work on cuda"),
        ({"tensor_parallel_size": 2}, "--tp 2 needs 2 GPUs, 1 is visible"),
        ({"tensor_parallel_size": 2, "engine": "v0"}, "--ablate driver-broadcast.*does not work on cuda"),
    ],
)
def test_options_of_the_cpu(answer, options: dict[str, Any], message: str) -> None:
    answer(H100)
    with pytest.raises(ConfigError, match=message):
        machine_for(configure(device="cuda", **options))


def test_ranks_have_the_memory_of_several_gpus(answer) -> None:
    answer(replace(H100, count=4))
    config = configure(device="cuda", tensor_parallel_size=4)
    machine = machine_for(config)
    assert machine.available_memory() == 4 * 79 * GIB
    assert machine.describe(config) == "cuda (4 x NVIDIA H100 80GB HBM3, compute capability 9.0, CUDA 13.0)"
    assert machine.environment(0) == {}


@pytest.mark.parametrize(
    ("given", "ranks", "count", "expected"),
    [
        ({}, 1, 2, ("CUDA_VISIBLE_DEVICES", "0", "1")),
        ({"CUDA_VISIBLE_DEVICES": "4, 2,7,1"}, 2, 4, ("CUDA_VISIBLE_DEVICES", "4,2", "7,1")),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, 1, 2, ("CUDA_VISIBLE_DEVICES", "GPU-a", "GPU-b")),
        ({"HIP_VISIBLE_DEVICES": "3,5"}, 1, 2, ("HIP_VISIBLE_DEVICES", "3", "5")),
    ],
)
def test_replicas_have_gpus_of_their_own(
    answer,
    given: dict[str, str],
    ranks: int,
    count: int,
    expected: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in cuda.VISIBLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    answer(replace(H100, count=count))
    machine = machine_for(configure(device="cuda", tensor_parallel_size=ranks, data_parallel_size=2))
    name, *gpus = expected
    assert [machine.environment(number) for number in range(2)] == [{name: one} for one in gpus]
    assert machine.available_memory() == ranks * 79 * GIB, "of one replica"


@pytest.mark.parametrize(
    ("ranks", "count", "message"),
    [(2, 2, "--tp 2 with --dp 2 needs 4 GPUs, 2 are visible"), (1, 1, "--dp 2 needs 2 GPUs, 1 is visible")],
)
def test_too_few_gpus_for_the_replicas(answer, ranks: int, count: int, message: str) -> None:
    answer(replace(H100, count=count))
    config = configure(device="cuda", tensor_parallel_size=ranks, data_parallel_size=2)
    with pytest.raises(ConfigError) as caught:
        start_cores(config, front_ends=1, step_timeout_s=1)
    assert str(caught.value) == message


@pytest.mark.parametrize("options", [{"tensor_parallel_size": 2}, {"data_parallel_size": 2}])
def test_other_devices_run_one_rank(answer, options: dict[str, Any]) -> None:
    answer(DeviceFacts(name="some", count=2))
    with pytest.raises(ConfigError, match=r"--[td]p 2 does not work on xpu"):
        machine_for(configure(device="xpu", **options))


@pytest.mark.parametrize(
    ("facts", "options", "message"),
    [
        (OLD_GPU, {"quantization": "int8"}, "--quantization int8 needs the Triton kernels: the GPU has compute"),
        (H100, {"quantization": "int4", "kernels": "torch"}, "--quantization int4 needs .*: --kernels torch"),
        (H100, {"kv_cache_dtype": "fp8", "kernels": "torch"}, "--kv-cache-dtype fp8 needs .*: --kernels torch"),
        (A100, {"quantization": "fp8"}, "--quantization fp8 needs compute capability 8.9, the GPU has 8.0: use int8"),
        (AMD, {"quantization": "fp8"}, "--quantization fp8 needs a GPU by NVIDIA: use int8"),
        (A100, {"quantization": "int8", "kv_cache_dtype": "fp8"}, ""),
        (AMD, {"quantization": "int4", "kv_cache_dtype": "int8"}, ""),
        (H100, {"quantization": "fp8", "kv_cache_dtype": "fp8_e4m3"}, ""),
    ],
)
def test_quantized_forms(answer, facts: DeviceFacts, options: dict[str, Any], message: str) -> None:
    answer(facts)
    config = configure(device="cuda", **options)
    if message:
        with pytest.raises(ConfigError, match=message):
            machine_for(config)
    else:
        machine = machine_for(config)
        assert (machine.kernels, machine.adapt(config)) == ("triton", config)


def test_other_devices_have_no_quantized_forms(answer) -> None:
    answer(DeviceFacts(name="Apple M3"))
    for options in ({"quantization": "int8"}, {"kv_cache_dtype": "int8"}):
        with pytest.raises(ConfigError, match="needs the Triton kernels: they run on cuda, not on mps"):
            machine_for(configure(device="mps", **options))
    config = configure(device="mps", quantization="fp8")
    assert machine_for(config).adapt(config).stored_quantization == "fp8"


def test_fp8_on_the_cpu_checks_weights_and_is_refused_for_keys_and_values() -> None:
    config = configure(device="cpu", quantization="fp8")
    adapted = machine_for(config).adapt(config)
    assert (adapted.quantization, adapted.stored_quantization) == (None, "fp8")
    assert machine_for(config).adapt(adapted) == adapted
    with pytest.raises(ConfigError, match="--kv-cache-dtype fp8 does not work on the CPU: use int8"):
        machine_for(config).adapt(configure(device="cpu", kv_cache_dtype="fp8"))


def test_products_with_quantized_weights_have_a_workspace(answer) -> None:
    pytest.importorskip("triton")
    from engine.kernels.triton.quantized import LinearWorkspace

    answer(H100)
    model_info, found = make_facts(), {}
    for quantization in (None, "int8", "fp8"):
        machine = machine_for(configure(device="cuda", quantization=quantization))
        found[quantization] = machine.workspace(model_info, 8, 100, 32)
    assert found["int8"] - found[None] >= LinearWorkspace.bytes(4)
    assert found["fp8"] - found[None] == 100 * (max(model_info.hidden_size, model_info.intermediate_size) + 4)


def test_triton_kernels_on_the_cpu() -> None:
    with pytest.raises(ConfigError, match="--kernels triton does not work on the CPU"):
        machine_for(configure(device="cpu", kernels="triton"))


def test_other_types_of_devices(answer) -> None:
    answer(DeviceFacts(name="Intel Data Center GPU Max 1550", free_bytes=48 * GIB))
    config = configure(device="xpu")
    machine = machine_for(config)
    assert (machine.torch_type, machine.kernels, machine.available_memory()) == ("xpu", "torch", 48 * GIB)
    assert machine.describe(config) == "xpu (Intel Data Center GPU Max 1550)"
    assert machine.warnings(config) == ["--device xpu has not been tested on hardware"]
    with pytest.raises(ConfigError, match="--kernels triton does not work on xpu: use auto or torch"):
        machine_for(configure(device="xpu", kernels="triton"))


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_batch_invariance_is_not_offered_on_devices(answer, device: str) -> None:
    answer(H100)
    with pytest.raises(ConfigError, match=f"--deterministic does not work on {device}: .*use --device cpu"):
        machine_for(configure(device=device, deterministic=True))


def test_a_device_that_does_not_tell_its_memory_has_the_hosts(answer, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(DeviceFacts())
    monkeypatch.setattr(devices.torch_device, "available_memory", lambda: 5 * GIB)
    machine = machine_for(configure(device="mps"))
    assert machine.available_memory() == 5 * GIB
    assert machine.describe(configure(device="mps")) == "mps"


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_memory_of_a_gpu_is_planned(answer, kernels: str) -> None:
    answer(H100)
    config = configure(device="cuda", kernels=kernels)
    plan = resolve(config, make_facts(dtype="bfloat16"))
    assert (plan.config.max_num_seqs, plan.config.max_num_batched_tokens, plan.config.block_size) == (256, 2048, 32)
    lines = {line.what: line.bytes for line in plan.memory}
    assert lines["workspace"] > cuda.RUNTIME_BYTES
    assert sum(lines.values()) <= 0.9 * 79 * GIB


def test_heads_that_the_triton_kernels_refuse_take_the_memory_of_the_attention_in_torch(answer) -> None:
    answer(H100)
    of = {
        (kernels, dim): machine_for(configure(kernels=kernels)).workspace(make_facts(head_dim=dim), 8, 512, 32)
        for kernels in ("auto", "torch")
        for dim in (256, 512)
    }
    assert of["auto", 512] == of["torch", 512]
    assert of["auto", 256] != of["torch", 256]


def test_both_are_machines() -> None:
    machines: list[Machine] = [
        CudaMachine(configure(), H100, has_triton=True),
        TorchMachine(configure(device="hpu"), DeviceFacts(name="HPU", free_bytes=GIB)),
    ]
    assert [machine.torch_type for machine in machines] == ["cuda", "hpu"]


def test_what_the_installed_torch_was_built_for() -> None:
    import torch

    build = probe.torch_build()
    assert build["__version__"] == torch.__version__
    assert build.get("cuda") == torch.version.cuda


def test_the_probe_answers_in_one_line_that_there_is_no_such_device() -> None:
    command = [sys.executable, "-m", probe.MODULE, "hpu", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "error" in json.loads(done.stdout.splitlines()[-1])
    with pytest.raises(ConfigError, match=r"--device hpu: .*: use --device cpu"):
        TorchMachine(configure(device="hpu"), DeviceFacts(error="none found"))


def test_a_probe_that_dies_is_an_error_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "MODULE", "engine.devices.no_such_module")
    facts = probe.ask.__wrapped__("cuda")
    assert "no_such_module" in facts.error
    assert "\n" not in facts.error
