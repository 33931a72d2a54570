"""Links to ranks on other machines: who may connect, and what is noticed when an end is gone."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.children import Failure
from engine.curve import RefusedError, UnreachableError, new_secret
from engine.errors import EngineDeadError, RedlineError
from engine.worker import tcp_links
from engine.worker.rank_links import Gone, LinkedRank
from engine.worker.rank_protocol import FrameKind, RankOptions, TcpLink
from engine.worker.rank_store import LOOPBACK
from engine.worker.tcp_links import TcpEnd, TcpLinks
from tests.engine.worker.driver import BASE
from tests.engine.worker.loopback_hosts import LoopbackHosts
from tests.engine.worker.test_multiprocess import start

PATIENCE_S = 60.0
COMMAND = (FrameKind.FORWARD, b"a step")


class Running:
    """A rank whose process is this one."""

    pid = os.getpid()
    name = "rank 0"
    state = "R"

    def __init__(self) -> None:
        self.has_ended = False

    def wait(self, timeout_s: float | None = None) -> bool:
        return self.has_ended

    def error(self, failure: Failure | None) -> RedlineError:
        return EngineDeadError("ended")

    def kill(self) -> None: ...

    def dump_stacks(self) -> None: ...

    def close(self) -> None: ...


class Here:
    """Implements RankHosts: the tests make the ranks' ends themselves."""

    address = LOOPBACK

    def __init__(self) -> None:
        self.options: list[RankOptions] = []
        self.rank = Running()

    def address_of(self, _rank: int) -> str:
        return LOOPBACK

    def start(self, options: RankOptions) -> LinkedRank:
        self.options.append(options)
        return self.rank

    def close(self) -> None: ...


class Pair:
    """Links to one rank, and the rank's end."""

    def __init__(self) -> None:
        self.hosts = Here()
        self.links = TcpLinks(self.hosts)
        self.links.start([RankOptions(rank=0, config={}, model_info={}, resolved={}, answers=True, receives=True)])
        link = self.hosts.options[0].link
        assert isinstance(link, TcpLink)
        self.link = link
        self.lost = threading.Event()
        self.end: TcpEnd | None = None
        self._open = True

    def connect(self) -> TcpEnd:
        self.end = TcpEnd(self.link, 0, self.lost.set)
        return self.end

    def close(self) -> None:
        if self._open:
            self._open = False
            self.links.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    if made.end is not None:
        made.end.close()
    made.close()


def test_frames_pass_both_ways_in_order_and_the_last_command_ends(pair: Pair) -> None:
    end, links = pair.connect(), pair.links
    bodies = [os.urandom(size) for size in (0, 1, 300, 1 << 20)]
    end.send(FrameKind.REPORT, b"up")
    assert links.next_frame(PATIENCE_S) == (0, (FrameKind.REPORT, b"up"))
    for body in bodies:
        assert links.send(FrameKind.FORWARD, body)
    links.end()
    assert [end.receive() for _ in bodies] == [(FrameKind.FORWARD, body) for body in bodies]
    assert end.receive() is None
    for body in bodies:
        end.send(FrameKind.STEP_RESULT, body)
    assert [links.next_frame(PATIENCE_S) for _ in bodies] == [(0, (FrameKind.STEP_RESULT, body)) for body in bodies]
    with pytest.raises(TimeoutError):
        links.next_frame(0.0)


def test_what_a_rank_sent_before_its_end_comes_before_the_news_of_it(pair: Pair) -> None:
    end, links = pair.connect(), pair.links
    end.send(FrameKind.REPORT, b"the cause")
    end.close()
    pair.end = None
    assert links.next_frame(PATIENCE_S) == (0, (FrameKind.REPORT, b"the cause"))
    assert links.next_frame(PATIENCE_S) == (0, Gone(tcp_links.SILENT))
    assert not links.send(*COMMAND)
    with pytest.raises(TimeoutError):
        links.next_frame(0.05)


def test_a_rank_that_ends_before_it_connects_is_gone(pair: Pair) -> None:
    pair.hosts.rank.has_ended = True
    assert pair.links.next_frame(PATIENCE_S) == (0, Gone())


def test_a_rank_that_never_connects_is_gone_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_links, "START_S", 0.1)
    pair = Pair()
    try:
        number, gone = pair.links.next_frame(PATIENCE_S) or (None, None)
        assert number == 0
        assert gone == Gone(f"has not connected to {pair.link.commands} within 0.1 s: is a firewall between them?")
    finally:
        pair.close()


def test_a_rank_notices_the_end_of_the_executor(pair: Pair) -> None:
    pair.connect()
    assert not pair.lost.is_set()
    pair.close()
    assert pair.lost.wait(PATIENCE_S)


@pytest.mark.parametrize("wait", ["receive", "next_frame"])
def test_waits_can_be_ended_from_another_thread(wait: str, pair: Pair) -> None:
    end, links = pair.connect(), pair.links
    waits: dict[str, tuple[Callable[[], object], Callable[[], None]]] = {
        "receive": (end.receive, end.interrupt),
        "next_frame": (links.next_frame, links.stop),
    }
    begin, interrupt = waits[wait]
    results: list[object] = []
    waiting = threading.Thread(target=lambda: results.append(begin()))
    waiting.start()
    time.sleep(0.05)
    interrupt()
    waiting.join(PATIENCE_S)
    assert results == [None]


def test_another_secret_is_refused(pair: Pair) -> None:
    pair.link.secret = new_secret()
    with pytest.raises(RefusedError, match="it has another secret"):
        pair.connect()
    with pytest.raises(TimeoutError):
        pair.links.next_frame(0.05)


def test_an_executor_out_of_reach_is_named(pair: Pair) -> None:
    pair.link.timeout_s = 0.2
    pair.close()
    with pytest.raises(UnreachableError, match=rf"^{pair.link.results} can't be reached"):
        pair.connect()


@pytest.fixture
def dummy(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "model_type": "llama"}))
    return tmp_path


def other_secret(options: RankOptions) -> None:
    assert isinstance(options.link, TcpLink)
    if options.rank == 1:
        options.link.secret = new_secret()


def out_of_reach(options: RankOptions) -> None:
    assert isinstance(options.link, TcpLink)
    if options.rank == 1:
        options.link.timeout_s, options.link.results = 0.2, "tcp://127.0.0.1:1"


@pytest.mark.parametrize(
    ("change", "cause"),
    [(other_secret, "refuses the connection: it has another secret"), (out_of_reach, "can't be reached: nothing has")],
)
def test_a_rank_that_can_not_connect_says_why(change: Callable[[RankOptions], None], cause: str, dummy: Path) -> None:
    hosts = LoopbackHosts(change)
    with pytest.raises(RedlineError, match=rf"^rank 1 \(process \d+\): tcp://127.0.0.1:\d+ {cause}"):
        start(dummy, 2, load_format="dummy", links=TcpLinks(hosts))
    assert hosts.closed


def test_a_rank_that_answers_no_heartbeat_ends_the_replica(dummy: Path) -> None:
    """As one does whose machine is gone."""
    executor = start(dummy, 2, load_format="dummy", links=TcpLinks(LoopbackHosts())).executor
    try:
        os.kill(executor.ranks[1].pid, signal.SIGSTOP)  # type: ignore[attr-defined]
        with pytest.raises(EngineDeadError, match=r"^rank 1 \(process \d+\) can't be reached any more: its machine"):
            executor.ended.result(PATIENCE_S)  # type: ignore[attr-defined]
    finally:
        executor.shutdown()


def no_avx(options: RankOptions) -> None:
    if options.rank == 1:
        options.config["kernels"] = "torch"


def test_ranks_with_different_kernels_are_a_warning(dummy: Path) -> None:
    executor = start(dummy, 2, load_format="dummy", links=TcpLinks(LoopbackHosts(no_avx))).executor
    try:
        [warning] = [one for one in executor.warnings if "different kernels" in one]  # type: ignore[attr-defined]
        assert re.search(
            r"^ranks compute with different kernels \(ranks 0: .*; ranks 1: torch \(--kernels torch\)\)", warning
        )
    finally:
        executor.shutdown()
