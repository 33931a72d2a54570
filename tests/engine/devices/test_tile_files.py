"""Files with measured tiles: writing, reading, errors that name file and field, and the file of a GPU."""

from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.devices.cpu import CpuMachine
from engine.devices.cuda import CudaMachine
from engine.devices.probe import DeviceFacts
from engine.devices.tile_files import default_file, find_table, read_table, write_table
from engine.errors import ConfigError
from engine.kernels.tile_table import Tile, TileTable
from engine.memory import resolve
from tests.engine.test_memory import GIB, make_facts

TABLE = TileTable(
    "sm_90", {("16-bit", 128, "prefill"): Tile(128, 64, 8, 3, 1), ("16-bit", 128, "decode"): Tile(16, 128, 4, 2, 4)}
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_written_table_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tiles.yaml"
    write_table(path, TABLE, gpu="NVIDIA H100 80GB HBM3", shape="32 heads")
    assert read_table(path, "sm_90") == TABLE
    text = path.read_text()
    assert text.startswith("gpu: NVIDIA H100 80GB HBM3\nshape: 32 heads\ntarget: sm_90\ntiles:\n- {numbers: 16-bit,")
    assert len(text.splitlines()) == 6
    assert [one.name for one in path.parent.iterdir()] == ["tiles.yaml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("target: sm_90\ntiles: [{numbers: 16-bit, head_dim: 128, launch: decode, lines: 16, keys: 48, warps: 4, "
         "stages: 3, programs: 3}]", "tiles[0].keys must be a power of two, not 48"),
        ("target: [", "expected"),
        ("target: sm_80\ntiles: []", "target is sm_80, and this GPU is sm_90"),
        ("- 1", "target and tiles are needed"),
    ],
)  # fmt: skip
def test_errors_name_file_and_field_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_table(path, "sm_90")
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert str(error.value).endswith("(--tile-table)")
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml cannot be read: No such file or directory \(--tile-table\)$"):
        read_table(tmp_path / "no.yaml")


def test_the_file_of_a_gpu(cache: Path) -> None:
    assert default_file("NVIDIA H100 80GB HBM3") == cache / "redline" / "tiles" / "NVIDIA-H100-80GB-HBM3.yaml"
    assert default_file("../x/..").parent == cache / "redline" / "tiles"
    assert default_file("").name == "gpu.yaml"


def test_the_default_file_is_used_if_it_is_there_and_right(cache: Path) -> None:
    assert find_table(None, "NVIDIA L4", "sm_90") == ("", [])
    path = default_file("NVIDIA L4")
    write_table(path, TABLE)
    assert find_table(None, "NVIDIA L4", "sm_90") == (str(path), [])
    assert find_table(None, "NVIDIA L4", None) == (str(path), [])
    file, warnings = find_table(None, "NVIDIA L4", "sm_80")
    assert file == ""
    assert warnings == [f"measured tiles are not used: {path}: target is sm_90, and this GPU is sm_80 (--tile-table)"]


def test_a_file_that_was_given_must_be_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(tmp_path / "t.yaml", TABLE)
    monkeypatch.chdir(tmp_path)
    assert find_table("t.yaml", "any", "sm_90") == (str(tmp_path / "t.yaml"), [])
    with pytest.raises(ConfigError, match="target is sm_90"):
        find_table("t.yaml", "any", "sm_120")


H100 = DeviceFacts(name="NVIDIA H100 80GB HBM3", free_bytes=79 * GIB, capability=(9, 0), driver="CUDA 13.0")


def test_a_gpu_takes_its_file_and_the_engine_passes_it_on(cache: Path) -> None:
    assert CudaMachine(EngineConfig(model="m"), H100, True).tile_table == ""
    path = default_file(H100.name)
    write_table(path, TABLE)
    config = EngineConfig(model="m")
    machine = CudaMachine(config, H100, True)
    assert machine.tile_table == str(path)
    assert resolve(config, make_facts(), machine=machine).config.tile_table == str(path)
    assert CudaMachine(EngineConfig(model="m", kernels="torch"), H100, True).tile_table == ""
    path.write_text("tiles: 1")
    machine = CudaMachine(config, H100, True)
    assert machine.tile_table == ""
    assert "measured tiles are not used: " in machine.warnings(config)[-1]


def test_a_table_is_refused_where_no_triton_kernels_run(tmp_path: Path) -> None:
    write_table(tmp_path / "t.yaml", TABLE)
    config = EngineConfig(model="m", tile_table=str(tmp_path / "t.yaml"))
    assert CudaMachine(config, H100, True).tile_table == str(tmp_path / "t.yaml")
    with pytest.raises(ConfigError, match="--tile-table needs the Triton kernels, which do not run on the CPU"):
        CpuMachine(config)
    with pytest.raises(ConfigError, match="--tile-table needs the Triton kernels"):
        CudaMachine(config, H100, False)
