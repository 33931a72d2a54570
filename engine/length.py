"""`--max-model-len auto`: the longest requests for which memory suffices."""

import dataclasses
from bisect import bisect_left

from engine.config import AUTO_LENGTH, EngineConfig
from engine.errors import OutOfMemoryError
from engine.machine import available_memory
from engine.memory import BLOCK_SIZE, resolve
from engine.model.facts import read_facts


def fit_length(config: EngineConfig, available: int | None = None) -> tuple[EngineConfig, int | None]:
    """The config with a length in place of AUTO_LENGTH, the model's own or as much of it as fits.

    `available` are the bytes that one replica may count on; None: its part of what is free now, which is then returned
    beside the config, so that the plan that follows counts on the same. Any other config is returned as it is.
    Raises OutOfMemoryError if not even a block of tokens fits.
    """
    if config.max_model_len != AUTO_LENGTH:
        return config, available
    if available is None:
        available = available_memory() // config.data_parallel_size
    facts = read_facts(config)

    def try_length(length: int) -> None:
        resolve(config, dataclasses.replace(facts, max_model_len=length), available)

    def too_long(length: int) -> bool:
        try:
            try_length(length)
        except OutOfMemoryError:
            return True
        return False

    length = facts.max_model_len
    if too_long(length):
        block = config.block_size or BLOCK_SIZE
        lengths = range(block, length, block)
        fitting = bisect_left(lengths, True, key=too_long)
        length = lengths[max(fitting, 1) - 1] if lengths else length
        try_length(length)
    return dataclasses.replace(config, max_model_len=length), available
