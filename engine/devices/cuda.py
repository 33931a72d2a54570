"""A GPU that torch drives as `cuda`: NVIDIA's, and AMD's with ROCm."""

import ctypes
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from engine.config import EngineConfig
from engine.devices import probe
from engine.devices.machine import (
    Defaults,
    StepTokens,
    activation_bytes,
    check_options,
    default_step_tokens,
    gathered_attention_bytes,
    refuse_quantized,
    refuse_tile_table,
    replica_flags,
)
from engine.devices.probe import DeviceFacts
from engine.devices.tile_files import find_table
from engine.errors import ConfigError
from engine.kernels.tile_table import target_of
from engine.kernels.triton.limits import attention_refusal
from engine.model.model_info import ModelInfo

MIN_CAPABILITY = (8, 0)  # of the Triton kernels: older GPUs have no bfloat16
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")  # ROCm heeds both
FP8_CAPABILITY = (8, 9)  # of products in fp8
RUNTIME_BYTES = 1 << 30  # context, compiled kernels, workspaces of cuBLAS
# Partial results of attention, which decode and prefill programs write: float32, a bound for all head sizes.
PARTIALS_BYTES = 256 << 20
# Of products with int8 and int4 weights: partial sums and converted weights, for float32 activations the most.
INTEGER_PRODUCTS_BYTES = 73 << 20


class CudaMachine:
    """Implements `engine.devices.machine.Machine`. Raises ConfigError for options that the GPU does not support.

    Args:
        facts: of the GPUs, without an error.
        has_triton: whether the package is installed.
    """

    torch_type = "cuda"
    simulated = ""
    defaults = Defaults(
        max_num_seqs=256, max_num_batched_tokens=2048, min_chunk=256, block_size=32, memory_utilization=0.9
    )

    def __init__(self, config: EngineConfig, facts: DeviceFacts, has_triton: bool):
        check_options(config, self.torch_type, ("auto", "triton", "torch"))
        self._facts = facts
        self._ranks, self._replicas = config.tensor_parallel_size, config.data_parallel_size
        self._replica_flags = [f"{flag} {count}" for flag, count in replica_flags(config).items()]
        self._check_count(1)
        self._reason = _no_triton(facts, has_triton)
        if config.kernels == "triton" and self._reason:
            raise ConfigError(f"--kernels triton: {self._reason}: use --kernels torch")
        self.kernels = "torch" if self._reason or config.kernels == "torch" else "triton"
        self.tile_table, self._notes = "", list[str]()
        if self.kernels == "torch":
            refuse_quantized(config, self._reason or "--kernels torch")
            refuse_tile_table(config, "here")
        elif config.tile_table is not None or not facts.differ:
            target = target_of(facts.capability) if facts.capability is not None else None
            self.tile_table, self._notes = find_table(config.tile_table, facts.name, target)
        self._quantization = config.quantization
        if self._quantization == "fp8":
            _check_fp8(facts)

    @property
    def gpu(self) -> str:
        """The name of the first GPU."""
        return self._facts.name

    def available_memory(self) -> int:
        """Free memory when the engine started: each rank can take what the GPU with the least has."""
        return self._ranks * (self._facts.free_bytes or 0)

    def environment(self, replica: int) -> dict[str, str]:
        """The GPUs of a replica: as many as it has ranks, from those that are visible to this process."""
        if self._replicas == 1:
            return {}
        self._check_count(self._replicas)
        name, gpus = _visible_gpus(self._facts.count)
        return {name: ",".join(gpus[replica * self._ranks : (replica + 1) * self._ranks])}

    def _check_count(self, replicas: int) -> None:
        needed, visible = self._ranks * replicas, self._facts.count
        if needed > visible:
            flags = [f"--tp {self._ranks}"] * (self._ranks > 1) + self._replica_flags * (replicas > 1)
            are = "is" if visible == 1 else "are"
            raise ConfigError(f"{' with '.join(flags)} needs {needed} GPUs, {visible} {are} visible")

    def workspace(self, model_info: ModelInfo, max_num_seqs: int, max_num_batched_tokens: int, block_size: int) -> int:
        """From the shapes of activations and logits, what attention needs, and what CUDA allocates itself."""
        activations = activation_bytes(model_info, max_num_seqs, max_num_batched_tokens)
        shape = model_info.num_heads, model_info.num_kv_heads, model_info.head_dim
        if self.kernels == "triton" and attention_refusal(*shape) is None:
            products = self._product_bytes(model_info, max_num_batched_tokens)
            return RUNTIME_BYTES + activations + PARTIALS_BYTES + products
        return RUNTIME_BYTES + activations + gathered_attention_bytes(model_info, block_size)

    def _product_bytes(self, model_info: ModelInfo, tokens: int) -> int:
        """What products with quantized weights need besides activations in the model's dtype."""
        if self._quantization is None:
            return 0
        if self._quantization == "fp8":
            return tokens * (max(model_info.hidden_size, model_info.intermediate_size) + 4)
        return INTEGER_PRODUCTS_BYTES

    def step_tokens(self, config: EngineConfig, model_info: ModelInfo) -> StepTokens:  # noqa: ARG002
        return default_step_tokens(self.defaults)

    def encoder_dtype(self, dtype: str) -> str:
        return dtype

    def adapt(self, config: EngineConfig) -> EngineConfig:
        return config

    def describe(self, config: EngineConfig) -> str:  # noqa: ARG002
        facts = self._facts
        capability = f"compute capability {facts.capability[0]}.{facts.capability[1]}" if facts.capability else ""
        name = f"{self._ranks} x {facts.name}" if self._ranks > 1 else facts.name
        return f"cuda ({', '.join(filter(None, (name, capability, facts.driver)))})"

    def warnings(self, config: EngineConfig) -> list[str]:
        warnings = ["--device cuda has not been tested on hardware", *self._notes]
        if self._facts.differ:
            warnings.append("the ranks have different GPUs: the slowest one sets the pace")
        if self._reason and config.kernels == "auto":
            warnings.append(f"{self._reason}: attention and sampling use PyTorch, which is slower")
        return warnings


def find_gpus(ranks: int) -> DeviceFacts:
    """The first GPUs, one for each rank, or why none can be used."""
    missing = _missing_software() or old_driver(probe.torch_build(), probe.driver_version)
    return DeviceFacts(error=missing) if missing else probe.ask("cuda", ranks)


def of_ranks(gpus: Sequence[DeviceFacts]) -> DeviceFacts:
    """What is known of the GPUs of ranks on several machines, given that of each rank."""
    capabilities = [one.capability for one in gpus if one.capability is not None]
    return DeviceFacts(
        name=gpus[0].name,
        free_bytes=min(one.free_bytes or 0 for one in gpus),
        capability=min(capabilities) if capabilities else None,
        count=len(gpus),
        differ=len({one.name for one in gpus}) > 1,
        driver=gpus[0].driver,
    )


def gpu_with_triton() -> DeviceFacts:
    """The first GPU, which runs the Triton kernels. Raises ConfigError if there is none."""
    facts = find_gpus(1)
    reason = facts.error or _no_triton(facts, has_triton())
    if reason:
        raise ConfigError(f"tiles can only be measured on a GPU with the Triton kernels: {reason}")
    return facts


def is_likely() -> bool:
    """Whether there may be a GPU to ask; does not start a process."""
    return not _missing_software()


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def old_driver(build: Mapping[str, str], driver_version: Callable[[], tuple[int, int]]) -> str:
    """Why the driver can't run a build of torch (see `probe.torch_build`); empty if it can.

    A driver runs builds for all versions of CUDA with its own major version
    (https://docs.nvidia.com/deploy/cuda-compatibility).
    """
    if "cuda" not in build:
        return ""
    version = driver_version()
    if version[0] >= int(build["cuda"].partition(".")[0]):
        return ""
    return (
        f"the NVIDIA driver supports CUDA {version[0]}.{version[1]}, too old for the installed PyTorch, which was "
        f"built for CUDA {build['cuda']} (install a newer driver)"
    )


def _visible_gpus(count: int) -> tuple[str, list[str]]:
    """The variable that restricts a process to some GPUs, and what it calls those that this process sees.

    The user may have named them, by numbers or by UUIDs. CUDA ignores names after one that it does not know.
    """
    name = next((name for name in VISIBLE if os.environ.get(name)), VISIBLE[0])
    given = os.environ.get(name)
    named = [one.strip() for one in given.split(",")] if given else [str(number) for number in range(count)]
    return name, named[:count]


def _no_triton(facts: DeviceFacts, installed: bool) -> str:
    """Why the Triton kernels can't be used; empty if they can."""
    if facts.capability is not None and facts.capability < MIN_CAPABILITY:
        has, needs = (".".join(map(str, one)) for one in (facts.capability, MIN_CAPABILITY))
        return f"the GPU has compute capability {has}, and the Triton kernels need {needs}"
    return "" if installed else "the package triton is not installed"


def _check_fp8(facts: DeviceFacts) -> None:
    """Raise ConfigError for a GPU that can't multiply in fp8."""
    if facts.capability is None:
        raise ConfigError("--quantization fp8 needs a GPU by NVIDIA: use int8")
    if facts.capability < FP8_CAPABILITY:
        has, needs = (".".join(map(str, one)) for one in (facts.capability, FP8_CAPABILITY))
        raise ConfigError(f"--quantization fp8 needs compute capability {needs}, the GPU has {has}: use int8")


def _missing_software() -> str:
    """What a GPU needs and isn't installed; empty if nothing is missing."""
    build = probe.torch_build()
    if "hip" in build:
        return "" if Path("/dev/kfd").exists() else "no AMD GPU driver was found (/dev/kfd)"
    if "cuda" not in build:
        return f"the installed PyTorch ({build.get('__version__', 'none')}) was built without CUDA"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver was found (libcuda.so.1)"
    return ""
