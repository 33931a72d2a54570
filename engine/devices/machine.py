"""What a device offers to an engine: its memory, its defaults, its warnings."""

from dataclasses import dataclass
from typing import Protocol

from engine.config import EngineConfig
from engine.model.model_info import ModelInfo


@dataclass(frozen=True, slots=True)
class Defaults:
    """Values of options that the user did not give."""

    max_num_seqs: int
    max_num_batched_tokens: int
    min_chunk: int  # prompt tokens that fit a step in which all requests decode
    block_size: int  # tokens
    memory_utilization: float  # fraction of the available memory that the engine may take


class Machine(Protocol):
    """Used in the EngineCore's process before a model is loaded."""

    defaults: Defaults

    def available_memory(self) -> int:
        """Bytes that the engine could take now."""
        ...

    def workspace(self, model_info: ModelInfo, max_num_seqs: int, max_num_batched_tokens: int, block_size: int) -> int:
        """Upper bound of the bytes that a step allocates on one rank; `model_info` is the rank's."""
        ...

    def describe(self, config: EngineConfig) -> str:
        """The device in the start table."""
        ...

    def warnings(self, config: EngineConfig) -> list[str]:
        """What the user should know about this configuration on this device."""
        ...
