"""Ranks that divide a model replay captured steps, in which they exchange tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from engine.kernels.triton import launch
from engine.messages import Sampling
from engine.worker import in_process
from tests.engine.kernels.triton import quick
from tests.engine.worker.device_driver import CoreDriver, start_executor
from tests.engine.worker.driver import build_model
from tests.engine.worker.rank_threads import RankThreads, launch_one_at_a_time, owner
from tests.engine.worker.stand_in_device import StandInDevice

quick.patch()


class _NoCapture:
    """In place of the thread of each executor: ranks capture by the same calls."""

    def __init__(self, *_: Any):
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("fails", [False, True], ids=["captured", "one fails"])
def test_ranks_replay_the_same_steps(fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Collectives are part of captured steps. If one rank can't capture a size, none replays it."""
    monkeypatch.setattr(in_process, "GraphCapture", _NoCapture)
    build_model("llama", tmp_path, num_hidden_layers=1)
    options = {"rows": 2, "max_num_batched_tokens": 8, "max_model_len": 30}
    requests = [([5, 6, 7], Sampling()), ([9, 8], Sampling(temperature=0.9, seed=3))]
    requests.append(([4], Sampling(temperature=0.8, top_k=7, seed=4)))
    alone, resolved = start_executor(None, tmp_path, kernels="torch", **options)
    expected = CoreDriver(alone, resolved).run(requests, 4)
    alone.shutdown()
    launch_one_at_a_time(monkeypatch)
    devices = [StandInDevice(delay_s=0.02, captures=True) for _ in range(2)]
    monkeypatch.setattr(launch, "place_of", lambda tensor: owner(devices, tensor))
    ranks = RankThreads(devices, tmp_path, tmp_path / "store", use_triton=True, **options)
    try:
        if fails:
            monkeypatch.setattr(devices[1], "capture", _refuse)
        while ranks.call("capture_graph", {}).result():
            pass
        steps: list[Any] = [one._device_runner._steps for one in ranks.executors]
        assert [one.captured for one in steps] == [0 if fails else 3] * 2  # decode 1, 2; mixed 8
        assert CoreDriver(ranks, ranks.resolved).run(requests, 4) == expected  # type: ignore[arg-type]
        assert [device.replays > 0 for device in devices] == [not fails] * 2
    finally:
        ranks.shutdown()


def _refuse(run: Callable[[], None]) -> Callable[[], None]:
    for _ in range(2):  # before the capture, and what the other rank's stand-in executes while it records
        run()
    raise RuntimeError("operation not permitted when stream is capturing")
