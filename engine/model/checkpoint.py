"""What safetensors files hold, by their headers."""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ModelError

INDEX = "model.safetensors.index.json"
NATIVE_INDEX = "consolidated.safetensors.index.json"

# Of the format: names as torch has them, and bytes of a number.
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
class Stored:
    """A tensor in a file; begin: its first byte."""

    file: Path
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    begin: int

    @property
    def kind(self) -> str:
        """The dtype as torch has it."""
        return DTYPES[self.dtype][0]

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numbers * DTYPES[self.dtype][1]


def headers(path: Path, name: str, *, native: bool = False) -> dict[str, Stored]:
    """All tensors of the model's files, by name; `name` is the model's, for errors; native: in Mistral's own files.

    Raises ModelError if there are none, or a file is missing, cut off or of another kind.
    """
    if not path.is_dir():
        raise ModelError(f"{name} is a config without weights: --load-format dummy runs it with random ones")
    index = path / (NATIVE_INDEX if native else INDEX)
    if index.exists():
        files = sorted({path / file for file in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = sorted(path.glob("consolidated*.safetensors" if native else "model*.safetensors"))
    if not files:
        raise ModelError(f"{name} {_without_weights(path, native)}")
    found: dict[str, Stored] = {}
    for file in files:
        try:
            stat = file.stat()
            found.update(_header(file, stat.st_size, stat.st_mtime_ns))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{name}: {file.name} is missing or isn't a safetensors file: {error}") from error
    return found


def _without_weights(path: Path, native: bool) -> str:
    """What a folder has in place of safetensors, and what can be done."""
    pickled = "consolidated*.pth" if native else "pytorch_model*.bin"
    if any(path.glob(pickled)):
        return f"has its weights as {pickled.replace('*', '')}, which isn't read: save it as safetensors"
    config, weights = ("params.json", "consolidated.safetensors") if native else ("config.json", "model.safetensors")
    other = ""
    if native and any(path.glob("model*.safetensors")):
        other = "--tokenizer-mode auto reads its model.safetensors, "
    return f"has a {config} but no weights ({weights}): {other}--load-format dummy runs it with random ones"


@functools.lru_cache(maxsize=1024)
def _header(file: Path, size: int, _changed_ns: int) -> dict[str, Stored]:
    """A file's tensors; read once as long as the file stays the same, since each part of a start asks for them."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > size:
            raise ValueError("it ends within its header")
        entries = json.loads(stream.read(length))
    entries.pop("__metadata__", None)
    data = 8 + length
    found = {
        name: Stored(file, entry["dtype"], tuple(entry["shape"]), data + entry["data_offsets"][0])
        for name, entry in entries.items()
    }
    unknown = sorted({stored.dtype for stored in found.values()} - set(DTYPES))
    if unknown:
        raise ValueError(f"numbers of type {', '.join(unknown)} aren't known")
    end = max((data + entry["data_offsets"][1] for entry in entries.values()), default=data)
    if end > size:
        raise ValueError(f"it has {size:,} bytes of {end:,}")
    return found
