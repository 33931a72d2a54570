"""The files of a model or a LoRA adapter on other machines: whether they are the same, and copies of them.

Without `--distribute-weights` the files must be at the same path on each machine. With it, the machine with the files
lists them and sends them in pieces, with the SHA-256 of each file at the end. A copy lies under a key made of the
names, sizes and times of the files, so that a later start of the same files sends nothing. It becomes visible once it
is complete and its sums are right.
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from engine.errors import ModelError
from engine.model.fingerprint import file_fingerprint
from engine.text import human_bytes

PIECE_BYTES = 8 << 20
PATTERNS = ("*.safetensors", "*.json", "*.model", "*.model.v*")  # that a model is loaded from
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # see `engine.model.lora.lora_weights`
ABANDONED_S = 24 * 3600  # age of an unfinished copy whose writer was killed

_UNFINISHED = ".unfinished-"


class ModelFile(msgspec.Struct, frozen=True):
    """A file of a model: its path below the folder, bytes, and time of change in ns."""

    name: str
    size: int
    changed_ns: int


def list_files(folder: Path) -> list[ModelFile]:
    """The files of a model that are to be copied, in the order of their names.

    Raises ModelError if it is no folder, or has none.
    """
    found = [_describe(folder, name) for name in names_of_model(folder)]
    if not found or folder.is_file():
        raise ModelError(f"--distribute-weights: {folder} is not a folder with the files of a model")
    return found


def list_adapter(folder: Path) -> list[ModelFile]:
    """The files of a LoRA adapter; empty if it lacks one. Nothing below the folder is read: clients choose it."""
    whole = all((folder / name).is_file() for name in ADAPTER_FILES)
    return [_describe(folder, name) for name in ADAPTER_FILES] if whole else []


def names_of_model(path: Path) -> list[str]:
    """The files of a model below its path, in order; "" for a model that is one file."""
    if path.is_file():
        return [""]
    paths = {found for pattern in PATTERNS for found in path.rglob(pattern) if found.is_file()}
    names = sorted(found.relative_to(path) for found in paths)
    return [str(name) for name in names if not any(part.startswith(".") for part in name.parts)]


def _describe(folder: Path, name: str) -> ModelFile:
    stat = (folder / name).stat()
    return ModelFile(name, stat.st_size, stat.st_mtime_ns)


def fingerprints(path: Path, names: Sequence[str]) -> dict[str, str]:
    """The fingerprint of each file below a path that exists, see `engine.model.fingerprint`."""
    return {name: file_fingerprint(path / name) for name in names if (path / name).is_file()}


def check_same(node: str, path: Path, what: str, own: dict[str, str], found: dict[str, str] | None) -> None:
    """Raise ModelError if a node has other files than this machine.

    Args:
        node: its address.
        path: of the files, on both.
        what: "model" or "adapter".
        own, found: the fingerprints of this machine and of the node; None: the node has nothing at that path.
    """
    advice = f"copy the {what} there, or give --distribute-weights"
    if found is None:
        raise ModelError(f"node {node} has no {path}: {advice}")
    other = [name or path.name for name, fingerprint in own.items() if found.get(name) != fingerprint]
    if other:
        some = ", ".join(other[:3]) + (", …" if len(other) > 3 else "")
        raise ModelError(f"node {node} has other files in {path} than this machine ({some}): {advice}")


def copy_key(folder: Path, files: Sequence[ModelFile]) -> str:
    """The name of a copy of these files."""
    digest = hashlib.sha256(msgspec.msgpack.encode((str(folder.resolve()), files))).hexdigest()
    return f"{folder.name}-{digest[:16]}"


def read_pieces(path: Path) -> Iterator[tuple[int, bytes]]:
    """A file in pieces, each with its place in bytes."""
    with path.open("rb") as file:
        at = 0
        while piece := file.read(PIECE_BYTES):
            yield at, piece
            at += len(piece)


class ModelCopy:
    """One copy on this machine. Methods may be called from several threads.

    Args:
        key: see `copy_key`.
        parent: of all copies; None: that of the user's cache.
    """

    def __init__(self, key: str, parent: Path | None = None):
        self._parent = copies_folder() if parent is None else parent
        self._key = key
        self._unfinished: Path | None = None

    @property
    def folder(self) -> Path | None:
        """Where the complete copy lies; None if there is none."""
        path = self._parent / self._key
        return path if path.is_dir() else None

    def begin(self, files: Sequence[ModelFile]) -> None:
        """Make room for the files. Raises ModelError if the disk has too little."""
        self._parent.mkdir(parents=True, exist_ok=True)
        for path in self._parent.glob(f"{_UNFINISHED}*"):
            if time.time() - path.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)
        needed, free = sum(file.size for file in files), shutil.disk_usage(self._parent).free
        if needed > free:
            raise ModelError(
                f"--distribute-weights: {self._parent} has {human_bytes(free)} free, and the files need "
                f"{human_bytes(needed)}"
            )
        self._unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self._parent))
        for file in files:
            path = self._path(file.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as made:
                made.truncate(file.size)

    def write(self, name: str, at: int, piece: bytes) -> None:
        """Write a piece of a file at a place in bytes."""
        descriptor = os.open(self._path(name), os.O_WRONLY)
        try:
            left = memoryview(piece)
            while left:
                written = os.pwrite(descriptor, left, at)
                left, at = left[written:], at + written
        finally:
            os.close(descriptor)

    def finish(self, sums: dict[str, str]) -> Path:
        """Check the files and make the copy visible; where it lies.

        Args:
            sums: SHA-256 of each file, by name.

        Raises ModelError if a file has another sum.
        """
        assert self._unfinished is not None
        for name, expected in sums.items():
            with self._path(name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected:
                self.drop()
                raise ModelError(f"--distribute-weights: {name} was damaged on its way: its checksum is wrong")
        target = self._parent / self._key
        try:
            self._unfinished.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            self.drop()  # another start has finished the same copy meanwhile
        self._unfinished = None
        return target

    def drop(self) -> None:
        """Remove what is not complete."""
        if self._unfinished is not None:
            shutil.rmtree(self._unfinished, ignore_errors=True)
            self._unfinished = None

    def _path(self, name: str) -> Path:
        assert self._unfinished is not None
        path = self._unfinished / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise ModelError(f"--distribute-weights: {name} lies outside of the model's folder")
        return path


def copies_folder() -> Path:
    """The folder of all copies on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "redline" / "distributed"
