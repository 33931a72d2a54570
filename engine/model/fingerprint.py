"""Tells whether two machines have the same files of a model, without reading gigabytes."""

from hashlib import blake2b
from pathlib import Path

from engine.model.config.file_names import CONFIG, PARAMS

WEIGHTS = ("*.safetensors", "*.gguf")
SAMPLE_BYTES = 1 << 16  # read at the beginning, in the middle and at the end of a file


def files_fingerprint(path: Path) -> str:
    """A hash of the names, sizes and samples of the files that decide what a model computes.

    Args:
        path: the folder of the model, or its only file.
    """
    files = [path] if path.is_file() else _files(path)
    digest = blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.name} {file_fingerprint(file)}\n".encode())
    return digest.hexdigest()


def file_fingerprint(path: Path) -> str:
    """A hash of the size and samples of a file. Weights of two models of one shape differ in most of their bytes."""
    size = path.stat().st_size
    digest = blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as opened:
        for begin in sorted({0, max(0, (size - SAMPLE_BYTES) // 2), max(0, size - SAMPLE_BYTES)}):
            opened.seek(begin)
            digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    found = [folder / name for name in (CONFIG, PARAMS)]
    found += [path for pattern in WEIGHTS for path in folder.glob(pattern)]
    return sorted(path for path in found if path.is_file())
