"""Steps of an asynchronous device with interpreted Triton kernels give the CPU's tokens."""

from pathlib import Path

import pytest

pytest.importorskip("triton")

from engine.kernels.triton import launch
from tests.engine.kernels.triton import quick
from tests.engine.worker.device_driver import CoreDriver, start_executor
from tests.engine.worker.driver import build_model
from tests.engine.worker.stand_in_device import StandInDevice
from tests.engine.worker.test_device_runner import SAMPLINGS, mixed_requests

quick.patch()


@pytest.mark.parametrize("kind", ["granite", "olmo3"])  # olmo3: layers with a window beside others without
def test_a_core_that_runs_ahead_gets_the_cpus_tokens(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_model(kind, tmp_path, num_hidden_layers=2)
    stand_in = StandInDevice(delay_s=0.2)
    monkeypatch.setattr(launch, "place_of", stand_in.place_of)
    requests, found = mixed_requests(SAMPLINGS, 5), []
    for device in (None, stand_in):
        executor, resolved = start_executor(device, tmp_path, use_triton=True, kernels="torch", max_model_len=100)
        try:
            found.append(CoreDriver(executor, resolved).run(requests, 5))
        finally:
            executor.shutdown()
    assert found[0] == found[1]
    assert stand_in.most_unready >= 2
