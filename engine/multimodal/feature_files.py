"""Feature files: the tensors of processed inputs as safetensors files in shared memory.

Each holder of a file, a front end's cache or the mirror of a core, has a hard link of its own in a folder of its own:
evicting a file is unlinking it, and no reference counts cross processes.
"""

import contextlib
import errno
import os
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from engine.errors import ConfigError, SharedMemoryFullError
from engine.owned_folder import OwnedFolder, remove_stale

SHARED_MEMORY = "/dev/shm"
PREFIX = "redline-mm-"
FULL = (errno.ENOSPC, errno.EDQUOT)
DEFAULT_CACHE = 4 << 30  # bytes, if shared memory has twice as much
RELEASE_S, RETRY_S = 2.0, 0.05  # until the locks of killed processes are free


class FeatureFolder(OwnedFolder):
    """A new folder for the feature files of one holder."""

    def __init__(self) -> None:
        super().__init__(find_parent(), PREFIX)


def find_parent() -> str:
    """Shared memory, or the temporary directory where there is none; the same for all processes of an engine."""
    return SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK | os.X_OK) else tempfile.gettempdir()


def cache_bytes(gigabytes: float | None) -> int:
    """Bytes of all feature caches together, `--mm-cache-gb`; None: the default. Raises ConfigError if they can't fit.

    The default is 4 GiB, and at most half of what is free in shared memory.
    """
    parent = find_parent()
    found = os.statvfs(parent)
    free, total = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    if gigabytes is None:
        return min(DEFAULT_CACHE, free // 2)
    size = int(gigabytes * (1 << 30))
    if size > total:
        raise ConfigError(
            f"--mm-cache-gb {gigabytes:g} exceeds {parent}, which has {total / (1 << 30):.2g} GiB: lower it, or raise "
            f"the container's --shm-size"
        )
    return size


def write_features(path: str, tensors: Mapping[str, NDArray[Any]]) -> int:
    """Write tensors to a new file; returns its bytes. Raises SharedMemoryFullError, with no file left."""
    data = save({name: one if one.flags.c_contiguous else np.ascontiguousarray(one) for name, one in tensors.items()})
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
    except OSError as error:
        unlink_features(path)
        if error.errno not in FULL:
            raise
        folder = os.path.dirname(os.path.dirname(path))
        raise SharedMemoryFullError(
            f"{folder} has no room for the {len(data) / (1 << 20):.1f} MiB of a multimodal input: lower --mm-cache-gb, "
            f"or raise the container's --shm-size"
        ) from error
    return len(data)


def read_features(path: str) -> dict[str, NDArray[Any]]:
    """The tensors of a file. Raises FileNotFoundError if it is gone."""
    return load_file(path)


def link_features(path: str, new: str) -> None:
    """Give another holder its own link, in its folder."""
    os.link(path, new)


def unlink_features(path: str) -> None:
    """Drop a holder's link; nothing happens if it is gone."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def remove_folders_of_killed() -> None:
    """Remove the folders of processes that are gone, now or within a short time: for the children of one of them."""
    until = time.monotonic() + RELEASE_S
    while time.monotonic() < until:
        remove_stale_features()
        time.sleep(RETRY_S)


def remove_stale_features() -> None:
    """Remove the folders of processes that are gone."""
    remove_stale(find_parent(), PREFIX)
