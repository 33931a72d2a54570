"""`python -m engine.worker.rank`: one of several ranks in a process of its own.

All ranks get the same commands and keep the same state of requests. They choose tokens together (see
`engine.model.runtime`), so each knows the tokens of all requests without a message. Only one rank sends results. In a
pipeline stage other than the last one tokens come from that one, see `engine.worker.stage_runners`. With `--ablate
driver-broadcast` only rank 0 gets commands, see `engine.worker.driver_broadcast`.
"""

import logging
import os
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from engine import children
from engine.children import Failure, Loading, Report, Up, encode_report
from engine.config import EngineConfig
from engine.errors import RedlineError, cause_of
from engine.log_format import log_everything
from engine.model.mm_facts import MMFacts
from engine.model.model_info import ModelInfo
from engine.pooling import PoolingSpec
from engine.resolved_config import ResolvedConfig
from engine.worker.local_links import LocalEnd
from engine.worker.own_blocks import OwnBlocks
from engine.worker.rank_links import RankEnd
from engine.worker.rank_protocol import (
    Call,
    CallResult,
    Features,
    FrameKind,
    PeerLostError,
    RankOptions,
    TcpLink,
    read_sample,
)
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
    try:
        end = open_end(options)
    except RedlineError as error:  # the executor is out of reach, the rank's host is not
        with children.reports_to(options.report_fd) as report:
            report(Failure.of(error))
        return error.exit_code
    with closing(end):
        return children.run_reporting(lambda: run(end, options), partial(_send_report, end), expected=(PeerLostError,))


def open_end(options: RankOptions) -> RankEnd:
    """The rank's end of its link. Raises RedlineError if the executor can't be reached."""
    if isinstance(options.link, TcpLink):
        from engine.worker.tcp_links import TcpEnd

        return TcpEnd(options.link, options.rank, _end_without_executor)
    assert options.link is not None
    return LocalEnd.of(options.link)


def _end_without_executor() -> None:
    log.error("the executor can't be reached any more")
    os._exit(1)  # other threads may wait for other ranks


def run(end: RankEnd, options: RankOptions) -> None:
    """Start the rank and serve until the executor ends it."""
    worker, report = start(options, lambda *loaded: _send_report(end, Loading(*loaded)))
    children.freeze_heap()
    _send_report(end, Up.of(report))
    with suppress(BrokenPipeError):  # the executor is gone
        if not options.receives:
            cast("Follower", worker).follow()
            return
        with closing(OwnBlocks(options.rank, worker.blocks, partial(end.send, FrameKind.BLOCKS_DONE))) as blocks:
            if options.device is None:
                serve(end, worker, end.send if options.answers else _drop, blocks)
                return
            from engine.worker.device_answers import DeviceAnswers

            with DeviceAnswers(end, sends=options.answers) as answers:
                serve(end, worker, answers.put, blocks)


def _send_report(end: RankEnd, report: Report) -> None:
    with suppress(BrokenPipeError):  # the executor is gone
        end.send(FrameKind.REPORT, encode_report(report))


def _drop(_kind: FrameKind, _answer: bytes) -> None:
    """The answer of a rank that another one speaks for."""


def start(options: RankOptions, progress: Callable[[int, int], None]) -> tuple[Any, StartReport]:
    """Start the worker, see `engine.worker.worker_start.Worker`; with `--ablate driver-broadcast`, a Follower.

    On a device it is a DeviceRunner.
    """
    config, resolved = EngineConfig(**options.config), ResolvedConfig(**options.resolved)
    given = options.model_info
    mm, pooling = msgspec.convert(given["mm"], MMFacts | None), msgspec.convert(given["pooling"], PoolingSpec | None)
    model_info = ModelInfo(**{**given, "path": Path(given["path"]), "mm": mm, "pooling": pooling})
    place = RankPlace(options.rank, options.store)
    shown = progress if options.rank == 0 else None
    if options.device is not None:
        return device_start(options.device, place)(config, model_info, resolved, shown)
    return start_worker(config, model_info, resolved, shown, place)


def serve(end: RankEnd, runner: Any, answer: Callable[[FrameKind, Any], None], blocks: OwnBlocks) -> None:
    """Execute commands until the executor ends the rank.

    Args:
        runner: a Runner, or a DeviceRunner, whose results are not computed yet.
        answer: called with the answer to each command.
        blocks: executes orders about host blocks that the core does not share.
    """
    while (command := end.receive()) is not None:
        kind, body = command
        if kind is FrameKind.FORWARD:
            runner.forward(body)
            answer(FrameKind.FORWARD_DONE, b"")
        elif kind is FrameKind.CALL:
            answer(FrameKind.CALL_RESULT, execute(runner, body))
        elif kind is FrameKind.BLOCKS:
            blocks.execute(body)
        elif kind is FrameKind.FEATURES:
            runner.put_features(msgspec.msgpack.decode(body, type=Features))
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
