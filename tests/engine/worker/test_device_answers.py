"""A rank's answers leave in the order of its commands, each once the device has computed it."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from engine.columns import int32s
from engine.messages import decode_result
from engine.worker.device_answers import DeviceAnswers
from engine.worker.device_runner import PendingResult
from engine.worker.local_links import LocalEnd, receive_frame
from engine.worker.rank_protocol import FrameKind
from tests.engine.worker.stand_in_device import StandInDevice

Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """The executor's and the rank's end of a socket."""
    executor, rank = socket.socketpair()
    executor.settimeout(30)
    with executor, rank:
        yield executor, rank


def pending(device: StandInDevice, step: int) -> PendingResult:
    tokens = device.fetch(device.place(torch.tensor([step + 40])))
    return PendingResult(step, device, device.clock(), tokens, None, ended=device.clock())


def is_silent(end: socket.socket) -> bool:
    end.setblocking(False)
    try:
        return not end.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    finally:
        end.settimeout(30)


def test_answers_leave_in_order(ends: Ends) -> None:
    executor, rank = ends
    device = StandInDevice()
    device.gate.clear()
    with DeviceAnswers(LocalEnd(rank, None), sends=True) as answers:
        answers.put(FrameKind.FORWARD_DONE, b"")
        answers.put(FrameKind.STEP_RESULT, pending(device, 1))
        answers.put(FrameKind.FORWARD_DONE, b"")
        answers.put(FrameKind.CALL_RESULT, b"called")
        assert receive_frame(executor) == (FrameKind.FORWARD_DONE, b"")
        time.sleep(0.1)
        assert is_silent(executor), "the device computes the step"
        device.gate.set()
        kind, body = receive_frame(executor) or (None, b"")
        assert (kind, int32s(decode_result(body).tokens).tolist()) == (FrameKind.STEP_RESULT, [41])
        assert receive_frame(executor) == (FrameKind.FORWARD_DONE, b"")
        answers.put(FrameKind.STEP_RESULT, pending(device, 2))
    assert receive_frame(executor) == (FrameKind.CALL_RESULT, b"called")
    assert (receive_frame(executor) or (None,))[0] is FrameKind.STEP_RESULT, "the end waits for answers that were put"


def test_other_ranks_are_silent(ends: Ends) -> None:
    executor, rank = ends
    with DeviceAnswers(LocalEnd(rank, None), sends=False) as answers:
        answers.put(FrameKind.STEP_RESULT, pending(StandInDevice(), 1))
    assert is_silent(executor)


@pytest.mark.parametrize("sends", [True, False])
def test_a_device_that_fails_ends_the_wait_for_commands(sends: bool, ends: Ends) -> None:
    _, rank = ends
    device = StandInDevice()
    device.failure = RuntimeError("an illegal access")

    def serve() -> None:
        with DeviceAnswers(LocalEnd(rank, None), sends=sends) as answers:
            answers.put(FrameKind.STEP_RESULT, pending(device, 1))
            assert rank.recv(1) == b"", "as if the executor had closed its end"

    with pytest.raises(RuntimeError, match="an illegal access"):
        serve()


def test_after_another_error_nothing_is_sent_any_more(ends: Ends) -> None:
    """The error is reported on the same socket, and the device may never be done."""
    executor, rank = ends
    device = StandInDevice()
    device.gate.clear()

    def fail() -> None:
        with DeviceAnswers(LocalEnd(rank, None), sends=True) as answers:
            answers.put(FrameKind.STEP_RESULT, pending(device, 1))
            raise ValueError("a step that can't be run")

    with pytest.raises(ValueError, match="can't be run"):
        fail()
    device.gate.set()
    [thread] = [one for one in threading.enumerate() if one.name == "answers"]
    thread.join(30)
    assert is_silent(executor)


def test_tokens_that_the_host_knows_need_no_device(ends: Ends) -> None:
    executor, rank = ends
    device: Any = StandInDevice()
    with DeviceAnswers(LocalEnd(rank, None), sends=True) as answers:
        answers.put(FrameKind.STEP_RESULT, PendingResult(7, device, 0.0, np.array([3, 4]), None))
    _, body = receive_frame(executor) or (None, b"")
    assert int32s(decode_result(body).tokens).tolist() == [3, 4]
