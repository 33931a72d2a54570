"""The devices that an engine can run on, as memory planning and the start table see them."""

from engine.config import EngineConfig
from engine.devices import cuda, probe
from engine.devices.cpu import CpuMachine
from engine.devices.cuda import CudaMachine
from engine.devices.machine import Machine
from engine.devices.simulated import SimulatedMachine
from engine.devices.torch_device import TorchMachine
from engine.errors import ConfigError
from engine.model.declared import read_declared
from engine.model.model_info import ModelInfo, read_model_info


def machine_for(config: EngineConfig) -> Machine:
    """The machine of `--device`; auto takes a GPU that PyTorch can use, else the CPU.

    Raises ConfigError if the device can't be used, or not with the other options.
    """
    if config.simulated:
        return SimulatedMachine(config)
    if config.device == "cpu" or (config.device == "auto" and not cuda.is_likely()):
        return CpuMachine(config)
    if config.device not in ("auto", "cuda"):
        return TorchMachine(config, probe.ask(config.device))
    facts = cuda.find_gpus(config.tensor_parallel_size)
    if not facts.error:
        return CudaMachine(config, facts, cuda.has_triton())
    if config.device == "cuda":
        raise ConfigError(f"--device cuda: {facts.error}: use --device cpu")
    return CpuMachine(config, [f"{facts.error}: the model runs on the CPU"])


def model_info_for(config: EngineConfig) -> ModelInfo:
    """What must be known of a model before it runs on the device of a configuration.

    Raises the errors of `read_model_info` and, if the device is simulated, `read_declared`.
    """
    return read_declared(config) if config.simulated else read_model_info(config)
