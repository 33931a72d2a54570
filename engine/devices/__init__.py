"""The devices that an engine can run on, as memory planning and the start table see them."""

from engine.config import EngineConfig
from engine.devices.cpu import CpuMachine
from engine.devices.machine import Machine


def machine_for(_config: EngineConfig) -> Machine:
    """The machine of `--device`. There is only the CPU so far."""
    return CpuMachine()
