"""`python -m engine.worker.rank`: one rank of several, in a process of its own, from orders on stdin to its end.

All ranks get the same orders and keep the same rows. They choose tokens together (see `engine.model.vocabulary`), so
that each knows those of all: what they feed back needs no message. Rank 0 alone answers. V0's way, where rank 0 alone
gets orders too, is in `engine.worker.broadcast`.
"""

import atexit
import contextlib
import logging
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec

from engine import children
from engine.children import Failure
from engine.config import DRIVER_BROADCAST, EngineConfig, ResolvedConfig
from engine.errors import EngineDeadError, RedlineError, cause_of
from engine.memory import threads_per_rank
from engine.model.facts import ModelFacts
from engine.model.split import plan_split
from engine.worker.ring import RingReader
from engine.worker.threads import limit_libraries, stay
from engine.worker.wire import (
    Answer,
    Call,
    Failed,
    Kind,
    Orders,
    PeerLostError,
    Up,
    loaded_body,
    read_sample,
    receive_order,
    send,
)

if TYPE_CHECKING:
    from engine.worker.broadcast import Follower
    from engine.worker.runner import Runner


def main() -> int:
    children.leave_signals_to_parent()
    orders = children.read_framed(sys.stdin.buffer, msgspec.msgpack.Decoder(Orders))
    if orders is None:
        return 1
    logging.basicConfig(format=f"%(levelname)s %(asctime)s %(name)s rank {orders.rank}: %(message)s")
    children.end_with_parent()
    with socket.socket(fileno=orders.socket_fd) as parent:
        failed = run(parent, orders)
        if failed is not None:
            with contextlib.suppress(BrokenPipeError):
                send(parent, Kind.FAILED, msgspec.msgpack.encode(failed))
    return 0 if failed is None else 1


def run(parent: socket.socket, orders: Orders) -> Failed | None:
    """Serve until the parent closes its end; returns why, if the rank can't go on."""
    try:
        ring = None if orders.ring_fd is None else RingReader(orders.ring_fd, orders.rank, orders.listeners)
        worker, up = build(orders, lambda *loaded: send(parent, Kind.LOADED, loaded_body(*loaded)))
        children.settle()
        send(parent, Kind.UP, msgspec.msgpack.encode(up))
        if ring is None:
            cast("Follower", worker).follow()
        else:
            serve(parent, ring, cast("Runner", worker), answers=orders.rank == 0)
    except PeerLostError as error:
        return Failed(Failure(EngineDeadError.__name__, f"lost another rank: {error}"), peer_lost=True)
    except RedlineError as error:
        return Failed(Failure.of(error))
    except BrokenPipeError:  # the parent is done with us
        return None
    except BaseException as error:  # whatever it is, the parent shows it last
        logging.getLogger("redline.worker").exception("failed")
        return Failed(Failure(EngineDeadError.__name__, cause_of(error)))
    return None


def build(orders: Orders, progress: Callable[[int, int], None]) -> "tuple[Runner | Follower, Up]":
    """Load the rank's share of the model, join the others, and allocate its KV cache; with what it has to report."""
    began = time.perf_counter()
    limit_libraries()
    import torch

    from engine.model.load import open_model
    from engine.model.shard import shard
    from engine.worker.broadcast import build_driven
    from engine.worker.group import GlooGroup
    from engine.worker.runner import build_runner

    config, resolved = EngineConfig(**orders.config), ResolvedConfig(**orders.resolved)
    facts = ModelFacts(**{**orders.facts, "path": Path(orders.facts["path"])})
    torch.set_num_threads(threads_per_rank(config.total_ranks))
    imported = time.perf_counter()
    blank = open_model(config, facts, progress if orders.rank == 0 else None)
    split = plan_split(config, facts)
    opened = time.perf_counter()
    group = GlooGroup(orders.rank, split.size, orders.store)
    atexit.register(group.close)
    joined = time.perf_counter()
    shard(blank, split, group)
    worker: Runner | Follower
    if DRIVER_BROADCAST in config.ablations:
        worker, built = build_driven(config, split.rank, resolved, blank, split, group)
    else:
        worker, built = build_runner(config, split.rank, resolved, blank, split)
    stay(built.cores)
    seconds = {
        "import torch": imported - began,
        "open model": opened - imported,
        "join ranks": joined - opened,
        "load weights": blank.seconds,
        "prepare kernels": time.perf_counter() - joined - blank.seconds,
    }
    return worker, Up(seconds, built.kernels, built.warnings)


def serve(parent: socket.socket, ring: RingReader, runner: "Runner", *, answers: bool) -> None:
    """Run orders as they come, until the parent closes its end."""
    while (order := receive_order(parent, ring)) is not None:
        kind, body = order
        if kind is Kind.FORWARD:
            runner.forward(body)
            answer, result = Kind.DONE, b""
        elif kind is Kind.CALL:
            answer, result = Kind.ANSWER, answer_call(runner, body)
        else:
            step, masks = read_sample(body)
            if masks:
                raise NotImplementedError("masks come with structured output")
            answer, result = Kind.RESULT, runner.sample(step)
        if answers:
            send(parent, answer, result)
    runner.close()


def answer_call(runner: "Runner", body: bytes) -> bytes:
    """Do what isn't a step; whatever fails is the answer, unless it is the loss of another rank."""
    try:
        call = msgspec.msgpack.decode(body, type=Call)
        return msgspec.msgpack.encode(Answer(runner.call(call.method, call.arguments)))
    except PeerLostError:
        raise
    except RedlineError as error:
        return msgspec.msgpack.encode(Answer(failure=Failure.of(error)))
    except Exception as error:
        logging.getLogger("redline.worker").exception("a call failed")
        return msgspec.msgpack.encode(Answer(failure=Failure(RedlineError.__name__, cause_of(error))))


if __name__ == "__main__":
    sys.exit(main())
