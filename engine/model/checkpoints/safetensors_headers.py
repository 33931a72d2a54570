"""Reads the headers of safetensors files: which tensors a checkpoint has, and where they lie."""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ModelError

INDEX = "model.safetensors.index.json"
MISTRAL_INDEX = "consolidated.safetensors.index.json"

# The format's dtypes: name in torch, bytes per element.
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file. `format_dtype` is a key of DTYPES, `offset` the position of the first byte in the file."""

    file: Path
    format_dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> str:
        """Name of the dtype in torch."""
        return DTYPES[self.format_dtype][0]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.format_dtype][1]


def read_headers(path: Path, name: str, *, mistral: bool = False) -> dict[str, StoredTensor]:
    """Read the headers of a model's files; returns all tensors by name.

    Raises ModelError if there are no files, or if one is missing, truncated or not in safetensors format.

    Args:
        path: the model's folder.
        name: the model as the user named it, for errors.
        mistral: read the files of Mistral's own format (`consolidated*.safetensors`).
    """
    if not path.is_dir():
        raise ModelError(f"{name} is a config without weights: --load-format dummy runs it with random ones")
    index = path / (MISTRAL_INDEX if mistral else INDEX)
    if index.exists():
        files = sorted({path / file for file in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = sorted(path.glob("consolidated*.safetensors" if mistral else "model*.safetensors"))
    if not files:
        raise ModelError(f"{name} {_no_weights(path, mistral)}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            stat = file.stat()
            tensors.update(_read_header(file, stat.st_size, stat.st_mtime_ns))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{name}: {file.name} is missing or isn't a safetensors file: {error}") from error
    return tensors


def _no_weights(path: Path, mistral: bool) -> str:
    """What a folder without safetensors has instead, and what the user can do."""
    pickled = "consolidated*.pth" if mistral else "pytorch_model*.bin"
    if any(path.glob(pickled)):
        return f"has its weights as {pickled.replace('*', '')}, which can't be read: convert it to safetensors"
    config, weights = ("params.json", "consolidated.safetensors") if mistral else ("config.json", "model.safetensors")
    other = ""
    if mistral and any(path.glob("model*.safetensors")):
        other = "--tokenizer-mode auto reads its model.safetensors, "
    return f"has a {config} but no weights ({weights}): {other}--load-format dummy runs it with random ones"


@functools.lru_cache(maxsize=1024)
def _read_header(file: Path, size: int, _changed_ns: int) -> dict[str, StoredTensor]:
    """The tensors of one file. Cached while size and time of change stay the same, as a start reads headers often."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > size:
            raise ValueError("it ends within its header")
        entries = json.loads(stream.read(length))
    entries.pop("__metadata__", None)
    data = 8 + length
    tensors = {
        name: StoredTensor(file, entry["dtype"], tuple(entry["shape"]), data + entry["data_offsets"][0])
        for name, entry in entries.items()
    }
    unknown = sorted({tensor.format_dtype for tensor in tensors.values()} - set(DTYPES))
    if unknown:
        raise ValueError(f"its dtype {', '.join(unknown)} isn't supported")
    end = max((data + entry["data_offsets"][1] for entry in entries.values()), default=data)
    if end > size:
        raise ValueError(f"it has {size:,} bytes of {end:,}")
    return tensors
