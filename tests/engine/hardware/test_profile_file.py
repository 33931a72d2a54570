"""The description of this machine: made of fits, written, read, and doubted."""

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from engine.errors import ConfigError
from engine.hardware.description import (
    THIS_MACHINE,
    EngineDefaults,
    Gemms,
    GemmTable,
    Hardware,
    Profiled,
    profile_file,
    read_hardware,
)
from engine.hardware.device_fit import MeasuredStep, fit_device
from engine.hardware.host_fit import with_costs
from engine.hardware.profile_file import describe, write_description
from engine.hardware.step_time import DecoderShape, StepTime, StepWork
from engine.host import processor
from engine.profiling import CPU_GRID

SHAPE = DecoderShape(4, 256, 512, 4, 2, 64, 1000)
DEFAULTS = EngineDefaults(128, 128, 16, 32, 0.5)


def description(**facts: object) -> Hardware:
    steps = [
        MeasuredStep(shape, one.work(1), 1e-3 + 5e-12 * shape.num_layers * shape.hidden_size**2 * one.work(1).tokens)
        for shape in CPU_GRID.shapes
        for one in CPU_GRID.compositions
    ]
    device = fit_device(steps, CPU_GRID.rows)
    profiled = Profiled(processor(), 2, "fused stack", "2026-11-29 12:00 UTC", "0.1.0", 0.0)
    hardware = describe(
        device, replace(profiled, **facts), DEFAULTS, title=f"{processor()}, 2 threads", memory_bytes=8 << 30
    )
    costs = np.array([1.0, 90.0, 3.0, 2.0])
    return with_costs(with_costs(hardware, "v1", costs), "v0", costs)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    hardware, path = description(), tmp_path / "new" / "mine.yaml"
    write_description(path, hardware)
    read = read_hardware(str(path))
    assert read.profiled == hardware.profiled
    assert read.defaults == DEFAULTS
    work = StepWork(3, 300, [(40, 10)], 4)
    assert StepTime(read, SHAPE).seconds(work) == pytest.approx(StepTime(hardware, SHAPE).seconds(work), rel=2e-3)
    assert path.read_text().startswith("# Written by `redline profile`")


@pytest.mark.parametrize(
    ("gemm", "error"),
    [
        (Gemms("profile"), "gemm needs either bf16 or bf16_table"),
        (Gemms("profile", bf16_table=GemmTable((1, 2), (5.0,))), "needs one weight_ps for each of its rows"),
        (Gemms("profile", bf16_table=GemmTable((), ())), "and at least one"),
        (
            Gemms("profile", bf16_table=GemmTable((4, 2), (5.0, 6.0))),
            "rows must be in ascending order",
        ),
    ],
)
def test_tables_of_products_are_checked(gemm: Gemms, error: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    write_description(path, replace(description(), gemm=gemm))
    with pytest.raises(ConfigError, match=f"mine.yaml: .*{error}"):
        read_hardware(str(path))


def test_this_machine_is_read_from_the_cache_once_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"hasn't been measured yet: run `redline profile` first"):
        read_hardware(THIS_MACHINE)
    write_description(profile_file(), description())
    assert read_hardware(THIS_MACHINE).title.startswith(processor())
    write_description(profile_file(), replace(description(), title="measured again"))
    assert read_hardware(THIS_MACHINE).title == "measured again"


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/mine.yaml cannot be written: .*\(--out\)"):
        write_description(tmp_path / "file" / "mine.yaml", description())
