"""`--max-model-len auto`: the longest requests that fit in memory."""

import dataclasses
from bisect import bisect_left

from engine.config import AUTO_LENGTH, EngineConfig
from engine.devices import machine_for, model_info_for
from engine.devices.machine import Machine
from engine.errors import OutOfMemoryError
from engine.memory import resolve


def fit_length(
    config: EngineConfig, available: int | None = None, machine: Machine | None = None
) -> tuple[EngineConfig, int | None]:
    """Replace AUTO_LENGTH by the model's maximum length, or by the longest that fits.

    `available` is the memory in bytes that one replica may use; None: its share of what is free now. That number is
    returned with the config, so that the memory plan uses the same one. A config with a length is returned unchanged.
    `machine`: that it runs on; None: that of `--device`.
    Raises OutOfMemoryError if not even one block of tokens fits.
    """
    if config.max_model_len != AUTO_LENGTH:
        return config, available
    machine = machine or machine_for(config)
    if available is None:
        available = machine.available_memory()
    model_info = model_info_for(config)

    def try_length(length: int) -> None:
        resolve(config, dataclasses.replace(model_info, max_model_len=length), available, machine)

    def too_long(length: int) -> bool:
        try:
            try_length(length)
        except OutOfMemoryError:
            return True
        return False

    length = model_info.max_model_len
    if too_long(length):
        block = config.block_size or machine.defaults.block_size
        lengths = range(block, length, block)
        fitting = bisect_left(lengths, True, key=too_long)
        length = lengths[max(fitting, 1) - 1] if lengths else length
        try_length(length)
    return dataclasses.replace(config, max_model_len=length), available
