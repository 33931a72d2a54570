"""`python -m engine.worker.rank`: one of several ranks in a process of its own.

All ranks get the same commands and keep the same state of requests. They choose tokens together (see
`engine.model.runtime`), so each knows the tokens of all requests without a message. Only rank 0 sends results. With
`--ablate driver-broadcast` only rank 0 gets commands, see `engine.worker.driver_broadcast`.
"""

import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from engine import children
from engine.children import Failure, Loading, Up
from engine.config import EngineConfig
from engine.errors import RedlineError, cause_of
from engine.log_format import log_everything
from engine.model.mm_facts import MMFacts
from engine.model.model_info import ModelInfo
from engine.resolved_config import ResolvedConfig
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
from engine.worker.worker_start import RankPlace, StartReport, device_start, start_worker

if TYPE_CHECKING:
    from engine.worker.driver_broadcast import Follower

log = logging.getLogger("redline.worker")


def main() -> int:
    """The rank's process, from the options on stdin to its end."""
    options = children.read_options(RankOptions)
    if options is None:
        return 1
    log_everything(logging.WARNING, rank=options.rank)
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
        elif options.device is None:
            serve(parent, ring, worker, partial(send, parent) if options.rank == 0 else _drop)
        else:
            from engine.worker.device_answers import DeviceAnswers

            with DeviceAnswers(parent, sends=options.rank == 0) as answers:
                serve(parent, ring, worker, answers.put)


def _drop(_kind: FrameKind, _answer: bytes) -> None:
    """The answer of a rank that rank 0 speaks for."""


def start(options: RankOptions, progress: Callable[[int, int], None]) -> tuple[Any, StartReport]:
    """Start the worker: a Runner or, with `--ablate driver-broadcast`, a Follower; on a device a DeviceRunner."""
    config, resolved = EngineConfig(**options.config), ResolvedConfig(**options.resolved)
    given = options.model_info
    mm = msgspec.convert(given["mm"], MMFacts | None)
    model_info = ModelInfo(**{**given, "path": Path(given["path"]), "mm": mm})
    place = RankPlace(options.rank, options.store)
    shown = progress if options.rank == 0 else None
    if options.device is not None:
        return device_start(options.device, place)(config, model_info, resolved, shown)
    return start_worker(config, model_info, resolved, shown, place)


def serve(parent: socket.socket, ring: RingReader, runner: Any, answer: Callable[[FrameKind, Any], None]) -> None:
    """Execute commands until the executor closes its end of the socket.

    Args:
        runner: a Runner, or a DeviceRunner, whose results are not computed yet.
        answer: called with the answer to each command.
    """
    while (command := receive_command(parent, ring)) is not None:
        kind, body = command
        if kind is FrameKind.FORWARD:
            runner.forward(body)
            answer(FrameKind.FORWARD_DONE, b"")
        elif kind is FrameKind.CALL:
            answer(FrameKind.CALL_RESULT, execute(runner, body))
        else:
            answer(FrameKind.STEP_RESULT, runner.sample(*read_sample(body)))
    runner.close()


def execute(runner: Any, body: bytes) -> bytes:
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
    children.end_process(main())
