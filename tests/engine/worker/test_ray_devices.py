"""What ranks on a Ray cluster run on, and the machine that memory is planned for."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.devices import cuda, probe
from engine.devices.probe import DeviceFacts
from engine.devices.tile_files import default_file, write_table
from engine.errors import ConfigError
from engine.kernels.tile_table import Tile, TileTable
from engine.worker.rank_protocol import DeviceKind
from engine.worker.ray_devices import CPUS, GPUS, choose, machine_of

CPU_BUILD, CUDA_BUILD = {"__version__": "2.9.0+cpu"}, {"__version__": "2.9.0", "cuda": "12.8"}
H100 = DeviceFacts(name="H100", free_bytes=70 << 30, capability=(9, 0), driver="CUDA 12.8")


def config(**options: Any) -> EngineConfig:
    return EngineConfig(
        **{"model": "m", "tensor_parallel_size": 2, "distributed_executor_backend": "ray", **options}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("device", "build", "gpus", "expected"),
    [
        ("cpu", CUDA_BUILD, 8, CPUS),
        ("auto", CUDA_BUILD, 1, CPUS),
        ("auto", CPU_BUILD, 8, CPUS),
        ("auto", CUDA_BUILD, 2, GPUS),
        ("cuda", CUDA_BUILD, 2, GPUS),
        ("cuda", CPU_BUILD, 0, GPUS),  # too few are an error of the reservation
    ],
)
def test_each_rank_gets_a_gpu_if_there_are_enough_or_they_are_asked_for(
    device: str, build: dict[str, str], gpus: int, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "torch_build", lambda: build)
    assert choose(config(device=device), gpus) is expected


def test_ranks_with_gpus_are_placed_close_together_and_others_apart() -> None:
    assert (GPUS.of_rank, GPUS.strategy, GPUS.scarce) == ({"CPU": 1, "GPU": 1}, "PACK", "GPU")
    assert (CPUS.of_rank, CPUS.strategy, CPUS.scarce) == ({"CPU": 1}, "SPREAD", "CPU")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "mps"}, "does not run ranks on mps: give --device cpu or cuda"),
        ({"device": "cuda", "kv_spill": "host=1GiB"}, "does not work with --kv-spill on GPUs: leave the flag out"),
    ],
)
def test_what_does_not_work_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose(config(**options), 8)


def test_ranks_without_gpus_are_planned_for_the_cpu() -> None:
    machine = machine_of(config(device="auto"), [])
    assert machine.torch_type == ""


def test_memory_is_planned_for_the_gpu_with_the_least() -> None:
    other = DeviceFacts(name="A100", free_bytes=30 << 30, capability=(8, 0), driver="CUDA 12.8")
    machine = machine_of(config(device="cuda"), [("10.0.0.1", H100), ("10.0.0.2", other)])
    assert machine.torch_type == "cuda"
    assert machine.available_memory() == 2 * (30 << 30)
    assert any("different GPUs" in warning for warning in machine.warnings(config(device="cuda")))
    assert "2 x H100, compute capability 8.0" in machine.describe(config(device="cuda"))


def test_tiles_of_this_user_are_not_used_since_other_nodes_may_lack_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table = TileTable("sm_90", {("16-bit", 128, "decode"): Tile(16, 128, 4, 2, 4)})
    write_table(default_file(H100.name), table)
    gpus = [("10.0.0.1", H100), ("10.0.0.2", H100)]
    given = str(default_file(H100.name))
    assert machine_of(config(device="cuda"), gpus).tile_table == ""
    monkeypatch.setattr(cuda, "has_triton", lambda: True)
    assert machine_of(config(device="cuda", tile_table=given), gpus).tile_table == given


def test_a_gpu_that_can_not_be_used_names_its_node() -> None:
    broken = DeviceFacts(error="no NVIDIA driver was found (libcuda.so.1)")
    with pytest.raises(ConfigError, match=r"^node 10.0.0.2: no NVIDIA driver was found .*: use --device cpu$"):
        machine_of(config(device="cuda"), [("10.0.0.1", H100), ("10.0.0.2", broken)])


@given(st.lists(st.tuples(st.sampled_from(["A", "B"]), st.integers(1, 1 << 40), st.integers(7, 12)), min_size=1))
def test_the_facts_of_all_gpus_are_those_that_bind(found: list[tuple[str, int, int]]) -> None:
    every = [DeviceFacts(name=name, free_bytes=free, capability=(major, 0)) for name, free, major in found]
    merged = cuda.of_ranks(every)
    assert merged.count == len(every)
    assert merged.free_bytes == min(free for _, free, _ in found)
    assert merged.capability == (min(major for _, _, major in found), 0)
    assert merged.differ == (len({name for name, _, _ in found}) > 1)
    assert not merged.error


def test_a_rank_elsewhere_takes_the_only_gpu_that_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.worker import worker_start
    from engine.worker.worker_start import RankPlace, device_start

    class TakenError(Exception):
        """What a device would be made of."""

    def take(torch_type: str, number: int) -> None:
        raise TakenError(torch_type, number)

    monkeypatch.setattr(worker_start, "_make_device", take)
    for alone, number in ((False, 3), (True, 0)):
        start = device_start(DeviceKind("cuda", use_triton=True, alone=alone), RankPlace(3, "store"))
        with pytest.raises(TakenError) as taken:
            start(None, None, None)  # type: ignore[arg-type]
        assert taken.value.args == ("cuda", number)
