"""Packed weights on disk are those that packing gives, whatever happens to their files."""

import logging
import os
import resource
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels.cpu import packed_files
from engine.kernels.cpu.packed_files import FEWEST_ELEMENTS, PART, PackedFiles
from engine.kernels.cpu.packing import Concatenated, Interleaved, Packed, pack
from engine.kernels.quantization import GROUPS

INPUTS = 256
OUTPUTS = FEWEST_ELEMENTS // INPUTS


def weight(seed: int = 0, outputs: int = OUTPUTS) -> Tensor:
    return torch.randn(outputs, INPUTS, generator=torch.Generator().manual_seed(seed)).bfloat16()


def equal(one: Packed, other: Packed) -> bool:
    assert one.scales is not None
    assert other.scales is not None
    return torch.equal(one.panels, other.panels) and torch.equal(one.scales, other.scales)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The weights that were packed, and not read."""
    packed: list[Any] = []

    def count(weight: Any, *arguments: Any) -> Packed:
        packed.append(weight)
        return pack(weight, *arguments)

    monkeypatch.setattr(packed_files, "pack", count)
    return packed


@pytest.mark.parametrize(
    "of",
    [weight(), weight().float(), Concatenated([weight(1), weight(2, 40)]), Interleaved(weight(3), weight(4))],
    ids=["bfloat16", "float32", "concatenated", "interleaved"],
)
def test_the_second_start_reads_what_the_first_one_packed(of: Any, tmp_path: Path, counted: list[Any]) -> None:
    folder = tmp_path / "made when needed"
    first = PackedFiles(folder).pack(of, "int4")
    again = PackedFiles(folder).pack(of, "int4")
    assert equal(first, pack(of, "int4"))
    assert equal(again, first)
    assert counted == [of]
    assert len(names(folder)) == 1, "nothing but the packed weight is left"


def test_panels_are_where_they_were_asked_for(tmp_path: Path) -> None:
    made: list[Tensor] = []

    def empty(*arguments: Any, **options: Any) -> Tensor:
        made.append(torch.empty(*arguments, **options))
        return made[-1]

    for _ in range(2):
        packed = PackedFiles(tmp_path).pack(weight(), "int4", empty)
        assert packed.panels is made[-1]


def test_other_weights_dtypes_and_shapes_have_files_of_their_own(tmp_path: Path, counted: list[Any]) -> None:
    files, whole = PackedFiles(tmp_path), weight()
    changed = whole.clone()
    changed[-1, -1] += 1
    for one in (whole, changed, whole.float(), whole.view(OUTPUTS // 2, 2 * INPUTS)):
        assert equal(files.pack(one, "int4"), pack(one, "int4"))
    assert len(counted) == len(names(tmp_path)) == 4


def test_other_code_packs_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[Any]) -> None:
    PackedFiles(tmp_path).pack(weight(), "int4")
    monkeypatch.setattr(packed_files, "_code", lambda: b"another version")
    PackedFiles(tmp_path).pack(weight(), "int4")
    assert len(counted) == 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "without scales", "another number", "without its hash"])
def test_a_damaged_file_is_packed_anew(damage: str, tmp_path: Path, counted: list[Any]) -> None:
    first = PackedFiles(tmp_path).pack(weight(), "int4")
    [file] = tmp_path.iterdir()
    if damage == "without scales":
        packed_files.save_file({"panels": first.panels}, file)
    elif damage == "without its hash":
        assert first.scales is not None
        packed_files.save_file({"panels": first.panels, "scales": first.scales}, file)
    elif damage == "another number":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(file.read_bytes()[:-100] if damage == "truncated" else b"")
    assert equal(PackedFiles(tmp_path).pack(weight(), "int4"), first)
    assert equal(PackedFiles(tmp_path).pack(weight(), "int4"), first)
    assert len(counted) == 2, "the file was written again"


def test_what_is_packed_as_fast_as_it_is_read_is_not_kept(tmp_path: Path) -> None:
    files = PackedFiles(tmp_path)
    for kind in sorted({"float32", "bfloat16", *GROUPS} - packed_files.KEPT_KINDS):
        files.pack(weight(), kind)
    files.pack(weight()[:-1], "int4")
    PackedFiles(None).pack(weight(), "int4")
    assert not names(tmp_path)


def test_a_folder_that_cannot_be_written_to_costs_nothing_but_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    files = PackedFiles(tmp_path / "file" / "folder")
    with caplog.at_level(logging.INFO):
        for seed in range(2):
            assert equal(files.pack(weight(seed), "int4"), pack(weight(seed), "int4"))
    files.close()
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "packed weights are not kept for the next start"
    ]


def test_a_file_that_cannot_be_written_whole_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as a disk that is full in the middle of a file
    try:
        with caplog.at_level(logging.INFO):
            found = PackedFiles(tmp_path).pack(weight(), "int4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert equal(found, pack(weight(), "int4"))
    assert not names(tmp_path)
    assert "not kept for the next start" in caplog.text


def test_parts_of_a_writer_that_was_killed_are_removed_after_a_day(tmp_path: Path) -> None:
    old, new = tmp_path / f"old{PART}", tmp_path / f"new{PART}"
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    files = PackedFiles(tmp_path)
    files.pack(weight(), "int4")
    files.close()
    assert not old.exists()
    assert new.exists(), "another start may be writing it"


def test_a_disk_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(1 << 40, 1 << 40, packed_files.LEAST_FREE_BYTES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert equal(PackedFiles(tmp_path).pack(weight(), "int4"), pack(weight(), "int4"))
    assert not names(tmp_path)


def test_files_that_were_not_used_for_longest_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        PackedFiles(tmp_path).pack(weight(seed), "int4")
        for path in tmp_path.iterdir():  # as if each start were a day later
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 86_400))
    before = set(names(tmp_path))
    PackedFiles(tmp_path).pack(weight(0), "int4")  # used again
    size = next(tmp_path.iterdir()).stat().st_size
    monkeypatch.setattr(packed_files, "MOST_BYTES", 3 * size)
    reading = PackedFiles(tmp_path)
    reading.pack(weight(2), "int4")
    reading.close()
    assert set(names(tmp_path)) == before, "nothing was stored"
    storing = PackedFiles(tmp_path)
    storing.pack(weight(3), "int4")
    storing.close()
    assert len(before - set(names(tmp_path))) == 1
    counts = [equal(PackedFiles(tmp_path).pack(weight(seed), "int4"), pack(weight(seed), "int4")) for seed in (0, 2, 3)]
    assert all(counts)
    assert len(names(tmp_path)) == 3, "weight 1 was the one that was removed"
