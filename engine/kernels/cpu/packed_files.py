"""Keeps packed weights in the user's cache: to quantize to int4 takes longer than all the rest of a start.

A file has one packed weight, under a hash of the weight's numbers and of the code that packs it: no other weight can be
read in its place, however the files of a checkpoint were changed. A hash of what was packed shows damage to the file.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.kernels import quantization
from engine.kernels.cpu import packing
from engine.kernels.cpu.packing import Empty, Packed, Weight, bands, pack

KEPT_KINDS = frozenset({"int4"})  # the others are packed about as fast as they are hashed and read
FEWEST_ELEMENTS = 1 << 16  # of a weight that is kept
MOST_BYTES = 32 << 30  # of all files; those that were not used for longest are removed
LEAST_FREE_BYTES = 8 << 30  # left on the disk
SUFFIX = ".safetensors"
PART = ".part"  # of a file that is being written
ABANDONED_S = 24 * 3600  # age of a part whose writer was killed
DIGEST = "sha256"  # of the packed numbers, in a file's metadata
KEY_CHARACTERS = 40

log = logging.getLogger("redline.worker")


def default_folder() -> Path | None:
    """The folder of the packed weights; None without a home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "redline" / "packed"
    except RuntimeError:
        return None


class PackedFiles:
    """Packs weights, or reads what was packed before.

    What can't be stored is packed at each start.

    Args:
        folder: of the files, made when needed; None: nothing is kept.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._stored = 0  # bytes

    def pack(self, weight: Weight, kind: str, empty: Empty = torch.empty) -> Packed:
        """As `engine.kernels.cpu.packing.pack`."""
        outputs, inputs = weight.shape
        if self._folder is None or kind not in KEPT_KINDS or outputs * inputs < FEWEST_ELEMENTS:
            return pack(weight, kind, empty)
        path = self._folder / f"{_key(weight, kind)}{SUFFIX}"
        found = _read(path, empty)
        if found is None:
            found = pack(weight, kind, empty)
            self._store(path, found)
        return found

    def _store(self, path: Path, packed: Packed) -> None:
        assert self._folder is not None
        assert packed.scales is not None, "only quantized weights are kept"
        size = packed.panels.nbytes + packed.scales.nbytes
        tensors = {"panels": packed.panels, "scales": packed.scales}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self._folder).free < size + LEAST_FREE_BYTES:
                raise OSError("the disk is nearly full")
            descriptor, part = tempfile.mkstemp(PART, path.stem, self._folder)
            os.close(descriptor)
            try:
                save_file(tensors, part, {DIGEST: _digest_of(packed)})
                Path(part).replace(path)  # a reader sees the whole file or none
            finally:
                Path(part).unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            log.info("packed weights are not kept for the next start: %s", error)
            self._folder = None
            return
        self._stored += size

    def close(self) -> None:
        """Remove files that were not used for longest, if this start has stored any and there are too many."""
        if self._folder is not None and self._stored:
            _prune(self._folder, MOST_BYTES)


def _key(weight: Weight, kind: str) -> str:
    """A hash of the weight's numbers, and of everything else that decides how it is packed."""
    digest = hashlib.sha256(_code())
    # Another order of sums may choose another one of two ranges that are equally good for a group.
    digest.update(f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()}".encode())
    digest.update(f"{kind} {tuple(weight.shape)}".encode())
    for band in bands(weight):
        digest.update(str(band.dtype).encode())
        digest.update(_bytes_of(band))
    return digest.hexdigest()[:KEY_CHARACTERS]


def _code() -> bytes:
    """A hash of the code that packs weights, and writes and reads the files."""
    modules = packing, quantization, sys.modules[__name__]
    return hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in modules)).digest()


def _digest_of(packed: Packed) -> str:
    assert packed.scales is not None, "only quantized weights are kept"
    digest = hashlib.sha256()
    for tensor in (packed.panels, packed.scales):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.contiguous().view(torch.uint8).numpy()


def _read(path: Path, empty: Empty) -> Packed | None:
    """The packed weight of a file, its panels in memory of `empty`; None if there is none, or if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            panels, scales = (file.get_tensor(name) for name in ("panels", "scales"))
            digest = (file.metadata() or {}).get(DIGEST)
    except (OSError, SafetensorError):
        return None
    packed = Packed(empty(panels.shape, dtype=panels.dtype).copy_(panels), scales.clone())
    if _digest_of(packed) != digest:
        return None
    with contextlib.suppress(OSError):  # of another user
        os.utime(path)  # the time of its last use
    return packed


def _prune(folder: Path, most: int) -> None:
    """Remove the files that were not used for longest until at most this many bytes are left, and abandoned parts."""
    files = sorted(_files(folder, SUFFIX), reverse=True)
    total = 0
    for _, size, path in files:
        total += size
        if total > most:
            with contextlib.suppress(OSError):  # another start has removed it
                path.unlink()
    for changed, _, path in _files(folder, PART):
        if changed < time.time() - ABANDONED_S:
            with contextlib.suppress(OSError):
                path.unlink()


def _files(folder: Path, suffix: str) -> Iterator[tuple[float, int, Path]]:
    """The time of the last use, size and path of each file."""
    for path in folder.glob(f"*{suffix}"):
        with contextlib.suppress(OSError):
            found = path.stat()
            yield found.st_mtime, found.st_size, path
