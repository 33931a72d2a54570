"""Steps that are made for a model with random weights run as the worker runs those of a scheduler."""

import pytest

from engine.hardware.step_time import DecoderShape, StepWork
from engine.worker.step_meter import Composition, StepMeter

SHAPE = DecoderShape(2, 64, 128, 4, 2, 16, 512)
COMPOSITIONS = (
    Composition(3, 20),
    Composition(chunks=((40, 0),)),
    Composition(5, 7, ((30, 10), (6, 50))),
    Composition(1, 90),
)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_each_composition_is_measured_again_and_again(kernels: str) -> None:
    with StepMeter(SHAPE, COMPOSITIONS, 3, {"kernels": kernels, "device": "cpu"}) as meter:
        assert ("torch" in meter.kernels) == (kernels == "torch") or kernels == "auto"
        for _ in range(2):
            for composition in COMPOSITIONS:
                times = meter.seconds(composition, 3)
                assert len(times) == 3
                assert all(0 < seconds < 10 for seconds in times)
    assert not meter.folder.exists()


def test_the_work_of_a_step() -> None:
    assert COMPOSITIONS[2].work(2) == StepWork(5, 50, [(30, 10), (6, 50)], 7)
    assert COMPOSITIONS[1].work(0) == StepWork(0, 0, [(40, 0)], 1)
    assert (COMPOSITIONS[2].longest, COMPOSITIONS[2].held) == (56, 40 + 40 + 56)
