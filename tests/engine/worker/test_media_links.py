"""Ranks that can't read the core's feature files get features over TCP."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.columns import column
from engine.messages import CopyingStep, MMInputRef, Sampling, SlotAssignment, StepMessage, encode
from engine.worker.media_links import MediaLinks
from engine.worker.multiprocess import MultiprocessExecutor
from engine.worker.rank_protocol import Features, FrameKind, RankOptions, TcpLink
from engine.worker.tcp_links import TcpEnd
from tests.engine.worker.loopback_hosts import LoopbackHosts
from tests.engine.worker.mm_driver import MMRequest, Prompts, start
from tests.engine.worker.mm_models import MM_MODELS
from tests.engine.worker.mm_parity import NEW, MMReference
from tests.engine.worker.test_tcp_links import PATIENCE_S, Here

NO_KEY = b"k" * 16


@contextmanager
def readable_here_only(requests: list[MMRequest]) -> Iterator[None]:
    """Replace the paths of all features by descriptors of this process: a rank finds nothing there."""
    opened: dict[str, int] = {}
    try:
        for request in requests:
            for one in request.inputs:
                if one.features not in opened:
                    opened[one.features] = os.open(one.features, os.O_RDONLY)
            request.inputs = tuple(
                msgspec.structs.replace(one, features=f"/proc/self/fd/{opened[one.features]}") for one in request.inputs
            )
        yield
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(2, {}), (2, {"ablate": ("driver-broadcast",)}), (1, {"pipeline_parallel_size": 2})],
    ids=["", "rank 0 drives", "pipeline stages"],
)
def test_the_tokens_are_those_of_one_rank(ranks: int, flags: dict[str, Any], tmp_path: Path) -> None:
    entry = MM_MODELS["llava"]
    reference = MMReference(entry.build(tmp_path), entry)
    over_tcp: Any = functools.partial(MultiprocessExecutor, links=MediaLinks(LoopbackHosts()))
    driver = start(tmp_path, ranks, make=over_tcp, **flags)
    try:
        requests = Prompts(tmp_path, entry).samples()
        with readable_here_only(requests):
            driver.run(requests, NEW, seed=6, preempt=0.6, chunk=9)
        assert driver.preemptions > 0
        assert driver.encoded > len({one.hash for request in requests for one in request.inputs})
        for request in requests:
            assert request.output == reference.run(request)[0]
    finally:
        driver.executor.shutdown()


def assigned(slot: int, *paths: str) -> SlotAssignment:
    refs = tuple(MMInputRef(NO_KEY, number, 1, features=path) for number, path in enumerate(paths))
    return SlotAssignment(slot, 1, column([1]), 1, 0, (column([1]),), Sampling(), mm_inputs=refs)


def test_features_come_before_the_step_that_encodes_them_and_no_other(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a", "b", "c")]
    for path in paths[:2]:
        Path(path).write_bytes(path.encode())
    steps: list[StepMessage] = [
        StepMessage(1, assigned_slots=(assigned(0, paths[0], paths[1]), assigned(2, paths[2]))),
        StepMessage(2, encoder_inputs=((0, 1), (0, 0))),
        CopyingStep(3, encoder_inputs=((2, 0),), block_copies=column([0, 1, 1])),  # a file that can't be read
        StepMessage(4, assigned_slots=(assigned(0, paths[0]),), encoder_inputs=((0, 0),)),  # again
    ]
    hosts = Here()
    links = MediaLinks(hosts)
    try:
        links.start([RankOptions(rank=0, config={}, model_info={}, resolved={}, answers=True, receives=True)])
        link = hosts.options[0].link
        assert isinstance(link, TcpLink)
        end = TcpEnd(link, 0, lambda: None)
        end.send(FrameKind.REPORT, b"up")
        links.next_frame(PATIENCE_S)
        for step in steps:
            assert links.send(FrameKind.FORWARD, encode(step))
        assert links.send(FrameKind.SAMPLE, b"x")
        links.end()
        found = []
        while (frame := end.receive()) is not None:
            found.append(frame)
        end.close()
    finally:
        links.close()
    forwards = [(FrameKind.FORWARD, encode(step)) for step in steps]
    features = [(FrameKind.FEATURES, msgspec.msgpack.encode(Features(path, path.encode()))) for path in paths[:2]]
    assert found == [
        forwards[0], features[1], features[0], forwards[1], forwards[2], features[0], forwards[3],
        (FrameKind.SAMPLE, b"x"),
    ]  # fmt: skip
