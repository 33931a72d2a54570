"""The protocol between an executor and its ranks.

executor ──FORWARD (a StepMessage), SAMPLE, CALL──────────► ranks that receive commands
executor ──FEATURES (see media_links.py), BLOCKS──────────► the same, on other machines
executor ◄──FORWARD_DONE, STEP_RESULT, CALL_RESULT───────── the rank that answers
executor ◄──REPORT (see `engine.children`), BLOCKS_DONE──── every rank

All ranks receive commands, unless rank 0 drives the others (see driver_broadcast.py).
"""

import struct
from enum import IntEnum
from typing import Any, TypeAlias

import msgspec

from engine.children import Failure, PipeOptions

_STEP = struct.Struct("<q")


class PeerLostError(Exception):
    """Another rank does not answer any more. The cause is in that rank."""


class FrameKind(IntEnum):
    FORWARD = 0
    SAMPLE = 1
    FORWARD_DONE = 2
    STEP_RESULT = 3  # an encoded StepResult
    REPORT = 4
    MORE = 5  # part of a command whose rest follows
    CALL = 6
    CALL_RESULT = 7
    END = 8  # the last command, where a link does not end by being closed
    FEATURES = 9  # of an input that the next step encodes, where ranks can't read the core's files; has no answer
    BLOCKS = 10  # a BlockOrder (see `engine.block_orders`), where ranks share no memory with the core
    BLOCKS_DONE = 11  # from every rank


Frame: TypeAlias = tuple[FrameKind, bytes]


class DeviceKind(msgspec.Struct):
    """What ranks run on besides the CPU.

    Args:
        torch_type: the device type of torch.
        use_triton: whether with the kernels in Triton, else with those in torch.
        memory_utilization: see `engine.worker.device_builder.build_device_runner`.
        alone: whether a rank sees its own device only, not those of the other ranks too.
    """

    torch_type: str
    use_triton: bool
    memory_utilization: float | None = None
    alone: bool = False


class LocalLink(msgspec.Struct, tag="local"):
    """See local_links.py.

    Args:
        ring_fd: None for a rank that receives no commands.
        ring_readers: the number of ranks that read the ring; `reader` is the number of this one among them.
    """

    socket_fd: int
    ring_fd: int | None
    reader: int
    ring_readers: int


class TcpLink(msgspec.Struct, tag="tcp"):
    """See tcp_links.py. The ZeroMQ addresses are the executor's, the secret is that of the run.

    Args:
        timeout_s: for the rank to connect.
    """

    commands: str
    results: str
    secret: str
    timeout_s: float


class RankOptions(PipeOptions):
    """What a rank is to run; config, model_info and resolved are the fields of those classes.

    Args:
        answers: whether it sends the answers to commands; one rank does (`EngineConfig.answering_rank`).
        receives: whether it receives commands; otherwise they come from rank 0.
        store: where the ranks find each other, see rank_store.py; set by the links, as `link` is.
        device: None: the CPU.
    """

    rank: int
    config: dict[str, Any]
    model_info: dict[str, Any]
    resolved: dict[str, Any]
    answers: bool
    receives: bool
    device: DeviceKind | None = None
    store: str = ""
    link: LocalLink | TcpLink | None = None


class Call(msgspec.Struct):
    method: str
    arguments: dict[str, Any]


class Features(msgspec.Struct, array_like=True):
    """The content of a feature file, and its path where the core runs."""

    path: str
    data: bytes


class CallResult(msgspec.Struct):
    """The result of the rank that answers. The other ranks have the same."""

    result: Any = None
    failure: Failure | None = None


def sample_body(step: int, masks: bytes = b"") -> bytes:
    return _STEP.pack(step) + masks


def read_sample(body: bytes) -> tuple[int, bytes]:
    """The number of the step, and its encoded masks."""
    step: int = _STEP.unpack_from(body)[0]
    return step, bytes(body[_STEP.size :])
