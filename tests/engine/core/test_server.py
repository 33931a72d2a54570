"""The core behind real sockets: threads, two front ends, shutdown, and an error of the loop."""

import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
import zmq

from engine.clock import MonotonicClock
from engine.columns import column, int32s
from engine.core.server import CoreServer
from engine.errors import EngineDeadError
from engine.messages import (
    AddRequest,
    Dead,
    FromCore,
    Outputs,
    Sampling,
    Shutdown,
    Utility,
    decode_from_core,
    encode,
    make_handle,
)
from tests.engine.core_driver import resolved
from tests.engine.fake_executor import FakeExecutor, expected_tokens


class InstantExecutor(FakeExecutor):
    """Delivers each result as soon as it is asked for."""

    def sample(self, step: int, masks: bytes = b"") -> Future[bytes]:
        result = super().sample(step, masks)
        self.pump()
        return result


class Served:
    """A CoreServer on its own thread and the sockets of two front ends."""

    def __init__(self, folder: Path, make: type[InstantExecutor] = InstantExecutor):
        to_core, from_core = f"ipc://{folder}/core", (f"ipc://{folder}/0", f"ipc://{folder}/1")
        self.context = zmq.Context()
        self.pulls = []
        for address in from_core:
            pull = self.context.socket(zmq.PULL)
            pull.bind(address)
            pull.setsockopt(zmq.RCVTIMEO, 10_000)
            self.pulls.append(pull)
        clock = MonotonicClock()
        self.executor = make(clock, 4)
        self.server = CoreServer(resolved(), self.executor, clock, to_core, from_core)
        self.error: BaseException | None = None
        self.push = self.context.socket(zmq.PUSH)
        self.push.connect(to_core)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.server.run()
        except BaseException as error:
            self.error = error

    def receive(self, front_end: int) -> FromCore:
        return decode_from_core(self.pulls[front_end].recv())

    def until_finished(self, front_end: int) -> list[int]:
        tokens: list[int] = []
        while True:
            message = self.receive(front_end)
            assert isinstance(message, Outputs)
            tokens += int32s(message.tokens).tolist()
            if message.finished:
                return tokens

    def close(self) -> None:
        self.thread.join(timeout=10)
        self.context.destroy(linger=0)


@pytest.fixture
def served(tmp_path: Path):
    server = Served(tmp_path)
    yield server
    if server.thread.is_alive():
        server.push.send(encode(Shutdown()))
    server.close()
    assert not server.thread.is_alive()


def test_each_front_end_gets_its_own_tokens(served: Served):
    for front_end in (0, 1):
        prompt = [front_end + 1] * 5
        served.push.send(encode(AddRequest(make_handle(front_end, 0), column(prompt), 6, Sampling())))
    for front_end in (0, 1):
        assert served.until_finished(front_end) == expected_tokens([front_end + 1] * 5, 6)


def test_a_message_that_cannot_be_read_harms_nobody(served: Served):
    served.push.send(b"\xc1 not msgpack")
    served.push.send(encode(AddRequest(make_handle(0, 0), column([1]), 3, Sampling())))
    assert served.until_finished(0) == expected_tokens([1], 3)


def test_shutdown_ends_the_loop(served: Served):
    served.push.send(encode(Shutdown(drain_s=0.0)))
    served.thread.join(timeout=10)
    assert not served.thread.is_alive()
    assert served.error is None


def test_an_error_of_the_loop_reaches_every_front_end(served: Served):
    served.executor.failure = RuntimeError("rank 0: out of memory")
    served.push.send(encode(AddRequest(make_handle(0, 0), column([1]), 3, Sampling())))
    for front_end in (0, 1):
        message = served.receive(front_end)
        while isinstance(message, Outputs):
            message = served.receive(front_end)
        assert isinstance(message, Dead)
        assert "rank 0: out of memory" in message.cause
    served.thread.join(timeout=10)
    assert isinstance(served.error, RuntimeError)


def test_workers_that_end_while_nothing_runs_end_the_server(served: Served):
    served.server.fail(EngineDeadError("rank 1 was killed by SIGKILL"))
    for front_end in (0, 1):
        assert served.receive(front_end) == Dead("rank 1 was killed by SIGKILL")
    served.thread.join(timeout=10)
    assert isinstance(served.error, EngineDeadError)


class FailingForward(InstantExecutor):
    """As a real executor: the forward pass fails, and so nothing can be sampled."""

    error: BaseException | None = None

    def submit(self, step: bytes) -> Future[None]:
        done = super().submit(step)
        if self.error is None:
            return done
        failed: Future[None] = Future()
        failed.set_exception(self.error)
        self.failure = RuntimeError("step 1 hasn't run")
        return failed


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ValueError("kernel: bad shape\nC++ stack follows"), "the EngineCore failed: ValueError: kernel: bad shape"),
        (MemoryError(), "the EngineCore failed: MemoryError (out of memory: lower --kv-cache-memory-bytes, "),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            "9 bytes. (out of memory: lower --kv-cache-memory-bytes",
        ),
        (EngineDeadError("rank 1 (process 9): RuntimeError: boom"), "rank 1 (process 9): RuntimeError: boom"),
    ],
)
def test_a_failing_forward_pass_is_named_not_what_follows_from_it(tmp_path: Path, error: Exception, cause: str):
    served = Served(tmp_path, FailingForward)
    served.executor.error = error  # type: ignore[attr-defined]
    served.push.send(encode(AddRequest(make_handle(0, 0), column([1]), 3, Sampling())))
    for front_end in (0, 1):
        message = served.receive(front_end)
        while isinstance(message, Outputs):
            message = served.receive(front_end)
        assert isinstance(message, Dead)
        assert cause in message.cause
        assert "\n" not in message.cause
    served.thread.join(timeout=10)
    assert served.error is error, "the last report is made of it"
    served.close()


def test_a_message_for_a_front_end_that_is_not_there_keeps_nobody_from_theirs(served: Served):
    served.push.send(encode(Utility(7, 1, "adapters")))
    served.push.send(encode(AddRequest(make_handle(5, 0), column([1]), 3, Sampling())))
    served.push.send(encode(AddRequest(make_handle(0, 0), column([1]), 3, Sampling())))
    assert served.until_finished(0) == expected_tokens([1], 3)


def test_a_thread_that_fails_ends_the_server_with_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(_: CoreServer) -> None:
        raise OSError("no more sockets")

    monkeypatch.setattr(CoreServer, "_receive_all", broken)
    served = Served(tmp_path)
    assert served.receive(0) == Dead("the EngineCore failed: OSError: no more sockets")
    served.server._inbound.close(linger=0)
    served.close()
    assert isinstance(served.error, OSError)
