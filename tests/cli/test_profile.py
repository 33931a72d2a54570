"""`redline profile`: flags, and a whole run in a reduced form; with --tune, one line without a GPU, and a run with
interpreted kernels on the stand-in."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from engine.devices import cuda
from engine.devices.probe import DeviceFacts
from engine.devices.tile_files import default_file, read_table
from engine.hardware.description import read_hardware
from engine.hardware.step_time import StepTime, StepWork
from engine.host import cores, processor
from engine.kernels.tile_table import Tile

SHAPE = ["--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--block-size", "8"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*SHAPE], "--heads needs --tune"),
        (["--tile-table", "x.yaml"], "--tile-table needs --tune"),
        (["some/model"], "the whole machine is measured, without MODEL; --tune measures the attention of MODEL"),
        (["--tune", "--out", "x.yaml", *SHAPE], "--out is the file of a hardware description"),
        (["--out", "x.json"], "--out x.json: the name of a description ends in .yaml"),
        (["--tune"], "give a model, or all of --heads, --kv-heads and --head-dim"),
        (["--tune", "--heads", "4"], "give a model, or all of --heads, --kv-heads and --head-dim"),
        (["m", "--tune", "--heads", "4"], "give either a model, or --heads, --kv-heads and --head-dim"),
        (["--tune", *SHAPE, "--block-size", "24"], "--block-size must be a power of two, not 24"),
        (["--tune", *SHAPE, "--kv-heads", "3"], "--heads 4 is not a multiple of --kv-heads 3"),
    ],
)
def test_wrong_flags_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("redline: error: ")
    assert said in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("facts", "triton", "reason"),
    [
        (DeviceFacts(error="no NVIDIA driver was found (libcuda.so.1)"), True, "no NVIDIA driver was found"),
        (DeviceFacts(name="V100", capability=(7, 0)), True, "the GPU has compute capability 7.0"),
        (DeviceFacts(name="H100", capability=(9, 0)), False, "the package triton is not installed"),
    ],
)
def test_without_a_gpu_for_the_kernels_the_reason_is_one_line(
    facts: DeviceFacts, triton: bool, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda, "find_gpus", lambda _ranks: facts)
    monkeypatch.setattr(cuda, "has_triton", lambda: triton)
    assert main(["profile", "--tune", *SHAPE]) == 2
    error = capsys.readouterr().err
    line = f"redline: error: tiles can only be measured on a GPU with the Triton kernels: {reason}"
    assert error.startswith(line)
    assert len(error.splitlines()) == 1


@pytest.fixture
def interpreted_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU that is the stand-in, with two tiles a launch and small workloads; returns the folder of the cache."""
    from engine.kernels.triton import launch
    from engine.kernels.triton.tiles import INTERPRETED_GPU
    from engine.worker import attention_tuning, tile_tuning, tuning_run
    from tests.engine.kernels.triton import quick
    from tests.engine.worker.stand_in_device import StandInDevice

    quick.patch()
    device = StandInDevice()
    few = {"decode": (tile_tuning.Workload(2, 1, 20),), "prefill": (tile_tuning.Workload(1, 17, 0),)}
    facts = DeviceFacts(name="NVIDIA H100 80GB HBM3", capability=(9, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda, "find_gpus", lambda _ranks: facts)
    monkeypatch.setattr(cuda, "has_triton", lambda: True)
    monkeypatch.setattr(launch, "place_of", device.place_of)
    monkeypatch.setattr(tuning_run, "CudaDevice", lambda: device)
    monkeypatch.setattr(tuning_run, "current_gpu", lambda: INTERPRETED_GPU)
    monkeypatch.setattr(tuning_run, "DeviceTimer", lambda _: lambda run: 1e-3)
    monkeypatch.setattr(attention_tuning, "candidates", lambda *_: [])
    monkeypatch.setattr(tile_tuning, "PROGRAMS", (1, 2))
    tune = partial(attention_tuning.tune_attention, workloads=few, cache_bytes=1)
    monkeypatch.setattr(tuning_run, "tune_attention", tune)
    return tmp_path


def run(*arguments: str) -> int:
    """The command in a thread, since the stand-in's checks hold for its thread's whole life."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(main, ["profile", *arguments]).result()


def test_a_table_is_written_and_shown(interpreted_gpu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--tune", *SHAPE) == 0
    path = default_file("NVIDIA H100 80GB HBM3")
    assert path.is_relative_to(interpreted_gpu)
    table = read_table(path)
    assert set(table.tiles) == {("16-bit", 16, "decode"), ("16-bit", 16, "prefill")}
    assert path.read_text().startswith(
        "gpu: NVIDIA H100 80GB HBM3\nshape: 4 heads, 2 KV heads of 16, bfloat16\nmade: '20"
    )
    shown = capsys.readouterr().out
    assert "measuring tiles of attention on NVIDIA H100 80GB HBM3: 4 heads, 2 KV heads of 16, bfloat16" in shown
    assert "decode: the built-in tile, 16×64, 1 warps" in shown
    assert "1000.0" in shown
    assert f"tile table: {path} (redline serve uses it on this GPU)" in shown


def test_tiles_of_other_shapes_stay_in_the_table(interpreted_gpu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = interpreted_gpu / "mine.yaml"
    row = "{numbers: 16-bit, head_dim: 128, launch: decode, lines: 16, keys: 128, warps: 8, stages: 2, programs: 2}"
    path.write_text(f"target: interpreter\ntiles:\n- {row}\n")
    assert run("--tune", *SHAPE, "--kv-cache-dtype", "int8", "--tile-table", str(path)) == 0
    tiles = read_table(path).tiles
    assert set(tiles) == {("16-bit", 128, "decode"), ("8-bit cache", 16, "decode"), ("8-bit cache", 16, "prefill")}
    assert tiles["16-bit", 128, "decode"] == Tile(16, 128, 8, 2, 2)
    assert "use it with redline serve --tile-table" in capsys.readouterr().out


def test_too_little_memory_is_one_line(
    interpreted_gpu: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from engine.worker import tuning_run

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")

    monkeypatch.setattr(tuning_run, "tune_attention", full)
    assert run("--tune", *SHAPE) == 1
    assert "redline: error: the GPU has too little free memory for the KV caches" in capsys.readouterr().err
    assert not default_file("NVIDIA H100 80GB HBM3").exists()


def test_the_shape_of_a_model_is_measured(
    interpreted_gpu: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, "--tune", "--dtype", "float32") == 0
    assert ": 4 heads, 2 KV heads of 8, float32 …" in capsys.readouterr().out
    assert set(read_table(default_file("NVIDIA H100 80GB HBM3")).tiles) == {
        ("float32", 16, "decode"), ("float32", 16, "prefill"),
    }  # fmt: skip


def test_a_file_that_is_no_table_is_reported_before_anything_is_measured(
    interpreted_gpu: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = interpreted_gpu / "mine.yaml"
    path.write_text("target: sm_90\ntiles: []\n")
    assert run("--tune", *SHAPE, "--tile-table", str(path)) == 2
    shown = capsys.readouterr()
    assert f"{path}: target is sm_90, and this GPU is interpreter (--tile-table)" in shown.err
    assert "× the built-in" not in shown.out


def test_a_reduced_profile_of_this_machine_can_be_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.measurement import host_costs
    from cli import profile_machine
    from engine import profiling
    from tests.engine.test_profiling import SMALL

    path = tmp_path / "mine.yaml"
    monkeypatch.setattr(profiling, "CPU_GRID", SMALL)
    monkeypatch.setattr(profile_machine, "RATES", (0.001, 0.003))
    monkeypatch.setattr(profile_machine, "HOST_ROUNDS", {"v1": 1, "v0": 1})
    monkeypatch.setattr(host_costs, "ARRIVE_S", 0.5)
    measure, measured = profile_machine._measure_loads, list[str]()

    def measure_loads(*arguments: Any) -> Any:
        measured.append(arguments[-1])
        return measure(*arguments)

    # Others use much of the cores, but only while engines are measured over HTTP.
    monkeypatch.setattr(profile_machine, "_measure_loads", measure_loads)
    monkeypatch.setattr(profiling.OtherLoad, "share", lambda _: 0.31 if measured == ["v1", "v0"] else 0.0)
    assert main(["profile", "--device", "cpu", "--out", str(path)]) == 0
    shown = capsys.readouterr().out
    assert f"description: {path} (use it with --device sim:{path})" in shown
    assert "others used 31% of the cores when it was measured" in shown
    hardware = read_hardware(str(path))
    assert hardware.profiled is not None
    assert hardware.profiled.processor == processor()
    assert hardware.title == f"{processor()}, {cores()} threads"
    assert hardware.is_cpu
    step = StepTime(hardware, SMALL.shapes[0]).seconds(StepWork(decodes=4, context=100, sampled=4))
    assert 0 < step + hardware.host.v1.step_seconds(4, 1) < 10


def test_a_folder_that_cannot_be_written_is_reported_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["profile", "--device", "cpu", "--out", str(tmp_path / "file" / "mine.yaml")]) == 2
    assert "cannot be written" in capsys.readouterr().err
