"""Copies of a model's files: complete and right, or not there."""

import hashlib
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ModelError
from engine.worker import model_copy
from engine.worker.model_copy import (
    ModelCopy,
    check_same,
    copy_key,
    fingerprints,
    list_adapter,
    list_files,
    names_of_model,
    read_pieces,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    (made / "1_Pooling").mkdir(parents=True)
    (made / ".cache").mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(os.urandom(1000))
    (made / "1_Pooling" / "config.json").write_text('{"a": 1}')
    (made / "README.md").write_text("not needed")
    (made / ".cache" / "other.json").write_text("not needed")
    return made


def send(folder: Path, copy: ModelCopy, spoil: str = "") -> Path:
    files, sums = list_files(folder), {}
    copy.begin(files)
    for file in files:
        for at, piece in read_pieces(folder / file.name):
            copy.write(file.name, at, bytes(len(piece)) if file.name == spoil else piece)
        sums[file.name] = hashlib.sha256((folder / file.name).read_bytes()).hexdigest()
    return copy.finish(sums)


def test_a_copy_has_the_files_that_a_model_is_loaded_from(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_copy, "PIECE_BYTES", 64)
    files = list_files(folder)
    names = ["1_Pooling/config.json", "config.json", "model.safetensors"]
    assert [file.name for file in files] == names
    copy = ModelCopy(copy_key(folder, files), tmp_path / "copies")
    assert copy.folder is None
    made = send(folder, copy)
    assert copy.folder == made
    for name in names:
        assert (made / name).read_bytes() == (folder / name).read_bytes()
    assert [path.name for path in (tmp_path / "copies").iterdir()] == [made.name]


@given(st.sampled_from(["config.json", "model.safetensors"]), st.integers(0, 10**9))
def test_changed_files_have_another_key(name: str, seconds: int) -> None:
    files = [model_copy.ModelFile("config.json", 2, 5), model_copy.ModelFile("model.safetensors", 1000, 6)]
    changed = [
        model_copy.ModelFile(one.name, one.size, one.changed_ns + 1 + seconds) if one.name == name else one
        for one in files
    ]
    assert copy_key(Path("/models/a"), files) != copy_key(Path("/models/a"), changed)
    assert copy_key(Path("/models/a"), files) != copy_key(Path("/models/b"), files)


def test_bytes_that_changed_on_their_way_leave_no_copy(folder: Path, tmp_path: Path) -> None:
    copy = ModelCopy("key", tmp_path / "copies")
    with pytest.raises(ModelError, match=r"model.safetensors was damaged on its way: its checksum is wrong"):
        send(folder, copy, spoil="model.safetensors")
    assert list((tmp_path / "copies").iterdir()) == []


def test_of_two_starts_at_once_each_gets_a_copy(folder: Path, tmp_path: Path) -> None:
    first, second = (ModelCopy("key", tmp_path / "copies") for _ in range(2))
    second.begin(list_files(folder))
    second.drop()
    made = send(folder, first)
    assert send(folder, second) == made
    assert [path.name for path in (tmp_path / "copies").iterdir()] == ["key"]


@pytest.mark.parametrize("name", ["../config.json", "/config.json"])
def test_names_outside_of_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    copy = ModelCopy("key", tmp_path)
    copy.begin([])
    with pytest.raises(ModelError, match="lies outside"):
        copy.write(name, 0, b"x")
    copy.drop()


def test_what_a_killed_start_left_is_removed(folder: Path, tmp_path: Path) -> None:
    old, new = (ModelCopy("key", tmp_path / "copies") for _ in range(2))
    old.begin([])
    [left] = (tmp_path / "copies").iterdir()
    os.utime(left, (0, 0))
    new.begin([])
    assert not left.exists()
    new.drop()


def test_a_folder_without_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"{tmp_path} is not a folder with the files of a model"):
        list_files(tmp_path)


def test_too_small_a_disk_is_named(folder: Path, tmp_path: Path) -> None:
    huge = [model_copy.ModelFile("model.safetensors", 1 << 60, 0)]
    with pytest.raises(ModelError, match=r" free, and the files need 1048576.0 TiB"):
        ModelCopy("key", tmp_path / "copies").begin(huge)


@given(st.binary(max_size=3000), st.integers(0, 2999), st.integers(1, 255))
def test_changed_bytes_of_small_files_are_noticed(data: bytes, at: int, change: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(data)
        before = fingerprints(path, [""])
        assert fingerprints(path, [""]) == before
        changed = bytearray(data)
        if at < len(data):
            changed[at] ^= change
        else:
            changed.append(change)
        path.write_bytes(changed)
        assert fingerprints(path, [""]) != before


def test_only_files_that_exist_have_fingerprints(folder: Path) -> None:
    assert set(fingerprints(folder, ["config.json", "none", "1_Pooling"])) == {"config.json"}


def test_the_files_to_compare_are_those_that_are_copied(folder: Path) -> None:
    assert names_of_model(folder) == [file.name for file in list_files(folder)]
    assert names_of_model(folder / "model.safetensors") == [""]
    assert names_of_model(folder / "none") == []


def test_an_adapter_has_two_files_and_nothing_below_is_searched(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("adapter_config.json", "below/adapter_model.safetensors", "other.safetensors"):
        (tmp_path / name).write_text(name)
    assert list_adapter(tmp_path) == []
    os.mkfifo(tmp_path / "adapter_model.safetensors")
    assert list_adapter(tmp_path) == []
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.safetensors").write_text("x")
    found = [(file.name, file.size) for file in list_adapter(tmp_path)]
    assert found == [("adapter_config.json", 19), ("adapter_model.safetensors", 1)]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, r"^node 10.0.0.2 has no /models/m: copy the model there, or give --distribute-weights$"),
        ({}, r"has other files in /models/m than this machine \(0, 1, 2, …\): copy the model there"),
        ({"0": "a", "1": "b", "2": "a", "3": "a"}, r"other files in /models/m than this machine \(1\): "),
    ],
)
def test_a_node_with_other_files_is_named(found: dict[str, str] | None, words: str) -> None:
    own = {str(number): "a" for number in range(4)}
    check_same("10.0.0.2", Path("/models/m"), "model", own, {**own, "more": "b"})
    with pytest.raises(ModelError, match=words):
        check_same("10.0.0.2", Path("/models/m"), "model", own, found)


def test_one_file_that_differs_has_its_name() -> None:
    with pytest.raises(ModelError, match=r"than this machine \(m.gguf\)"):
        check_same("10.0.0.2", Path("/models/m.gguf"), "model", {"": "a"}, {"": "b"})
