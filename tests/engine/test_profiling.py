"""A profile of this machine in a reduced form: its own steps are predicted in order of size."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from engine import profiling
from engine.devices import cpu, cuda, probe
from engine.devices.probe import DeviceFacts
from engine.errors import ConfigError
from engine.hardware.step_time import DecoderShape
from engine.host import cores, processor
from engine.profiling import (
    CPU_GRID,
    GPU_GRID,
    Grid,
    OtherLoad,
    ProfiledDevice,
    SpeedMeter,
    find_device,
    measure_device,
)
from engine.worker.step_meter import Composition

SMALL = Grid(
    shapes=(DecoderShape(6, 128, 256, 4, 2, 32, 512), DecoderShape(2, 256, 512, 4, 4, 64, 512)),
    rows=(1, 8, 64),
    decodes=((1, 20), (8, 20), (8, 200), (64, 20)),
    chunks=((16, 0), (64, 0), (64, 100)),
    mixed=((8, 20, 56, 0),),
    rounds=2,
    repeats=2,
)


def test_a_small_grid_is_measured_and_fitted() -> None:
    shown: list[tuple[int, int]] = []
    measured = measure_device(SMALL, lambda done, total, _: shown.append((done, total)), {"device": "cpu"})
    assert shown == [(0, 4), (0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(measured.steps) == len(SMALL.shapes) * len(SMALL.compositions)
    table = measured.fit.gemm.bf16_table
    assert table is not None
    assert table.rows == SMALL.rows
    assert table.weight_ps[0] <= table.weight_ps[1] <= table.weight_ps[2]
    assert measured.fit.bandwidth > 1e6
    assert measured.kernels
    assert measured.defaults.block_size == 32


def test_the_speed_is_that_of_a_step_against_the_same_step_before() -> None:
    measured = measure_device(SMALL, lambda *_: None, {"device": "cpu"})
    with SpeedMeter(SMALL, measured, {"device": "cpu"}) as meter:
        step = Composition(8, 20).work(SMALL.repeats // 2)
        assert meter.described_s == next(
            one.seconds for one in measured.steps if one.shape == SMALL.shapes[0] and one.work == step
        )
        assert meter.speed() > 0
        assert meter.tokens_per_s == pytest.approx(8 / meter.described_s)


def test_the_device_that_is_measured_has_its_own_name_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available_memory", lambda: 3 << 30)
    assert find_device("cpu") == ProfiledDevice("cpu", f"{processor()}, {cores()} threads", 3 << 30, CPU_GRID)
    facts = DeviceFacts(name="NVIDIA H100 80GB HBM3", free_bytes=79 << 30, capability=(9, 0))
    monkeypatch.setattr(cuda, "find_gpus", lambda _ranks: facts)
    monkeypatch.setattr(cuda, "has_triton", lambda: True)
    assert find_device("cuda") == ProfiledDevice("cuda", "NVIDIA H100 80GB HBM3", 79 << 30, GPU_GRID)


def test_devices_that_cannot_be_profiled_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "ask", lambda _device, _ranks=1: DeviceFacts(name="some", free_bytes=1 << 30))
    with pytest.raises(ConfigError, match=r"--device mps can't be profiled: use cpu or cuda"):
        find_device("mps")


def test_shapes_differ_in_what_the_fit_tells_apart() -> None:
    layers, groups = zip(*((one.num_layers, one.num_heads / one.num_kv_heads) for one in CPU_GRID.shapes), strict=True)
    assert len(set(layers)) == len(set(groups)) == len(CPU_GRID.shapes)
    assert all(dataclasses.astuple(one)[-2:] == ("bf16", "bf16") for one in CPU_GRID.shapes)


def test_load_of_others_is_a_share() -> None:
    load = OtherLoad()
    assert 0 <= load.share() <= 1


def test_what_this_process_and_its_children_use_is_not_the_load_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    now: dict[str, Any] = {"passed": 100.0, "used": [50.0, 70.0, 9.0], "own": 20.0, "children": 30.0}

    def times() -> SimpleNamespace:
        return SimpleNamespace(user=now["own"], system=0.0, children_user=now["children"], children_system=1.0)

    monkeypatch.setattr(profiling.time, "monotonic", lambda: now["passed"])
    monkeypatch.setattr(profiling.os, "times", times)
    monkeypatch.setattr(profiling.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(
        profiling.psutil, "cpu_times", lambda percpu: [SimpleNamespace(user=used, system=0.0) for used in now["used"]]
    )
    load = OtherLoad()
    # In 10 s, two cores are used for 14 s, 11 s of them by this process and by children that have ended; the third core
    # is not for this process.
    now |= {"passed": 110.0, "used": [58.0, 76.0, 19.0], "own": 22.0, "children": 39.0}
    assert load.share() == pytest.approx(3 / 20)
    now |= {"children": 80.0}  # of children that began before
    assert load.share() == 0
