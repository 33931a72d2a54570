"""The content hash of a multimodal input: equal hashes mean equal features.

Every part is preceded by its length, so that no two inputs are confused. The hash is BLAKE2b with 128 bits, as those of
KV blocks, of which it becomes a part.
"""

import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from engine.multimodal.types import MediaKind

HASH_BYTES = 16
# Files of a model's folder that decide how inputs are processed.
PROCESSING_FILES = (
    "config.json", "params.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "tekken.json",
)  # fmt: skip


class InputHasher:
    """Hashes the inputs of one model with one set of processor options."""

    def __init__(self, folder: Path, family: str, options: Mapping[str, Any]):
        """`options` are those of `--mm-processor-kwargs`."""
        self._options = dict(options)
        self._model = b"".join(map(_framed, (str(folder).encode(), family.encode(), _fingerprint(folder))))

    def options_of(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of an input: the server's, with those of its request."""
        return self._options | dict(options) if options else self._options

    def hash_input(self, kind: MediaKind, data: bytes, count: int, options: Mapping[str, Any]) -> bytes:
        """The hash of an input.

        Args:
            data: as its sender encoded it.
            count: number of inputs of the kind in the prompt, on which some processors depend.
            options: of its request; they replace those of the server.
        """
        canonical = json.dumps(self.options_of(options), sort_keys=True, separators=(",", ":"), default=repr)
        state = blake2b(digest_size=HASH_BYTES)
        for part in (self._model, kind.encode(), str(count).encode(), canonical.encode()):
            state.update(_framed(part))
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
        return state.digest()


def _framed(part: bytes) -> bytes:
    return len(part).to_bytes(8, "little") + part


def _fingerprint(folder: Path) -> bytes:
    """A digest of the files that decide how inputs are processed."""
    state = blake2b(digest_size=HASH_BYTES)
    for name in PROCESSING_FILES:
        try:
            content = (folder / name).read_bytes()
        except OSError:
            continue
        state.update(_framed(name.encode()) + _framed(content))
    return state.digest()
