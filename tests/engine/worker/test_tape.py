"""The recorder of the stand-in device replays what a CUDA graph would, and fails where one would."""

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from tests.engine.worker.rank_threads import launch_one_at_a_time
from tests.engine.worker.tape import Tape, watch_launches


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def test_a_replay_computes_anew_at_the_same_addresses() -> None:
    static, runs = torch.zeros(2, 3), []
    with Tape() as tape:
        runs.append(1)
        doubled = static * 2
        doubled[0] += 1
        halves = doubled.chunk(2)
    static.fill_(4)
    before = doubled.data_ptr()
    tape.replay()
    assert doubled.tolist() == [[9, 9, 9], [8, 8, 8]]
    assert halves[1].tolist() == [[8, 8, 8]]
    assert doubled.data_ptr() == before
    assert len(runs) == 1


def test_what_nothing_writes_is_garbage() -> None:
    with Tape() as tape:
        out = torch.empty(4)
        out[:2].fill_(1)
    tape.replay()
    assert out[:2].tolist() == [1, 1]
    assert out[2:].isnan().all()


def test_memory_that_was_freed_since() -> None:
    passing = torch.ones(3)
    with Tape() as tape:
        out = passing * 2
    tape.replay()
    assert out.tolist() == [2, 2, 2]
    del passing
    with pytest.raises(AssertionError, match="memory that was freed"):
        tape.replay()


@triton.jit
def _increment(at: tl.pointer_type) -> None:
    tl.store(at, tl.load(at) + 1)


def test_kernels_of_threads_that_take_turns_are_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    watch_launches()  # as by another test of the same process
    launch_one_at_a_time(monkeypatch)
    count = torch.zeros(1)
    with Tape() as tape:
        _increment[(1,)](count)
    assert count.tolist() == [1]
    tape.replay()
    assert count.tolist() == [2]
