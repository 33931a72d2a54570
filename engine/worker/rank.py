"""`python -m engine.worker.rank`: one of several ranks in a process of its own.

All ranks get the same commands and keep the same state of requests. They choose tokens together (see
`engine.model.runtime`), so each knows the tokens of all requests without a message. Only rank 0 sends results. With
`--ablate driver-broadcast` only rank 0 gets commands, see `engine.worker.driver_broadcast`.
"""

import logging
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec

from engine import children
from engine.children import Failure, Loading, Up
from engine.config import EngineConfig, ResolvedConfig
from engine.errors import RedlineError, cause_of
from engine.model.model_info import ModelInfo
from engine.worker.rank_protocol import (
    Call,
    CallResult,
    FrameKind,
    PeerLostError,
    RankOptions,
    read_sample,
    receive_command,
    send,
    send_report,
)
from engine.worker.ring import RingReader
from engine.worker.worker_start import RankPlace, StartReport, start_worker

if TYPE_CHECKING:
    from engine.worker.driver_broadcast import Follower
    from engine.worker.runner import Runner

log = logging.getLogger("redline.worker")


def main() -> int:
    """The rank's process, from the options on stdin to its end."""
    options = children.read_options(RankOptions)
    if options is None:
        return 1
    logging.basicConfig(format=f"%(levelname)s %(asctime)s %(name)s rank {options.rank}: %(message)s")
    children.end_with_parent()
    with socket.socket(fileno=options.socket_fd) as parent:
        report = partial(send_report, parent)
        return children.run_reporting(lambda: run(parent, options), report, expected=(PeerLostError,))


def run(parent: socket.socket, options: RankOptions) -> None:
    """Start the rank and serve until the executor closes its end of the socket."""
    ring = None if options.ring_fd is None else RingReader(options.ring_fd, options.rank, options.ring_readers)
    worker, report = start(options, lambda *loaded: send_report(parent, Loading(*loaded)))
    children.freeze_heap()
    send_report(parent, Up.of(report))
    with suppress(BrokenPipeError):  # the executor is gone
        if ring is None:
            cast("Follower", worker).follow()
        else:
            serve(parent, ring, cast("Runner", worker), answers=options.rank == 0)


def start(options: RankOptions, progress: Callable[[int, int], None]) -> "tuple[Runner | Follower, StartReport]":
    config, resolved = EngineConfig(**options.config), ResolvedConfig(**options.resolved)
    model_info = ModelInfo(**{**options.model_info, "path": Path(options.model_info["path"])})
    place = RankPlace(options.rank, options.store)
    return start_worker(config, model_info, resolved, progress if options.rank == 0 else None, place)


def serve(parent: socket.socket, ring: RingReader, runner: "Runner", *, answers: bool) -> None:
    """Execute commands until the executor closes its end of the socket."""
    while (command := receive_command(parent, ring)) is not None:
        kind, body = command
        if kind is FrameKind.FORWARD:
            runner.forward(body)
            answer, result = FrameKind.FORWARD_DONE, b""
        elif kind is FrameKind.CALL:
            answer, result = FrameKind.CALL_RESULT, execute(runner, body)
        else:
            answer, result = FrameKind.STEP_RESULT, runner.sample(read_sample(body))
        if answers:
            send(parent, answer, result)
    runner.close()


def execute(runner: "Runner", body: bytes) -> bytes:
    """Execute a call and encode its result, or its error. Only PeerLostError is raised."""
    try:
        call = msgspec.msgpack.decode(body, type=Call)
        return msgspec.msgpack.encode(CallResult(runner.call(call.method, call.arguments)))
    except PeerLostError:
        raise
    except RedlineError as error:
        return msgspec.msgpack.encode(CallResult(failure=Failure.of(error)))
    except Exception as error:
        log.exception("a call failed")
        return msgspec.msgpack.encode(CallResult(failure=Failure(RedlineError.__name__, cause_of(error))))


if __name__ == "__main__":
    sys.exit(main())
