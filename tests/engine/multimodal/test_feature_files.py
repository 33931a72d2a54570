"""Feature files: what is written is read, links outlive each other, a full memory is a clear error."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import ConfigError, SharedMemoryFullError
from engine.multimodal import feature_files
from engine.multimodal.feature_files import (
    FeatureFolder,
    cache_bytes,
    link_features,
    read_features,
    unlink_features,
    write_features,
)


def test_tensors_are_read_as_they_were_written() -> None:
    folder = FeatureFolder()
    path = os.path.join(folder.path, "1")
    tensors = {
        "pixels": np.arange(12, dtype=np.float32).reshape(3, 4).T,  # not contiguous
        "sizes": np.array([3, 4]),
        "one": np.array(5, dtype=np.int32),
        "mask": np.array([True, False]),
    }
    size = write_features(path, tensors)
    assert size == os.path.getsize(path)
    found = read_features(path)
    assert {name: (one.dtype, one.shape) for name, one in found.items()} == {
        name: (one.dtype, one.shape) for name, one in tensors.items()
    }
    assert all(np.array_equal(found[name], tensors[name]) for name in tensors)
    folder.remove()
    assert not os.path.exists(folder.path)


def test_each_holder_has_its_own_link() -> None:
    front_end, core = FeatureFolder(), FeatureFolder()
    path, linked = os.path.join(front_end.path, "1"), os.path.join(core.path, "1")
    write_features(path, {"x": np.ones(3)})
    link_features(path, linked)
    unlink_features(path)
    unlink_features(path)
    assert (read_features(linked)["x"] == 1).all()
    front_end.remove()
    assert os.path.exists(linked)
    core.remove()


def test_a_full_memory_names_what_to_change_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.fdopen

    class Full:
        def __init__(self, descriptor: int, *arguments: Any, **options: Any):
            self._file = opened(descriptor, *arguments, **options)

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def write(self, data: memoryview) -> int:
            if self._file.tell() < 100:
                return int(self._file.write(data[:100]))
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(feature_files.os, "fdopen", Full)
    with pytest.raises(SharedMemoryFullError, match=r"no room for the 0\.\d MiB .*--mm-cache-gb.*--shm-size"):
        write_features(str(tmp_path / "1"), {"x": np.ones(100_000)})
    assert os.listdir(tmp_path) == []


def test_a_cache_that_can_not_fit_is_refused() -> None:
    assert cache_bytes(0.5) == 1 << 29
    assert cache_bytes(0) == 0
    assert 0 < cache_bytes(None) <= 4 << 30
    with pytest.raises(ConfigError, match=r"--mm-cache-gb 1e\+06 exceeds .*--shm-size"):
        cache_bytes(1e6)
