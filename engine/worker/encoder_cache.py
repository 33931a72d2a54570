"""The embeddings of multimodal inputs on a worker's device; the core decides what is in the cache."""

from collections.abc import Callable, Iterable

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor

from engine.messages import MMInputRef
from engine.model.encoders.base import EncodedInput, Encoder
from engine.worker.rank_protocol import Features


class EncoderCache:
    """Embeddings by key (`MMInputRef.hash`).

    Args:
        encoder: the model's.
        place: copies a tensor to the device of the model.
        dtype: of the embeddings; None: as the encoder returns them.
        hidden, layers: numbers of an embedding, and layers with deepstack features.
    """

    def __init__(
        self,
        encoder: Encoder,
        place: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        dtype: torch.dtype | None = None,
        hidden: int = 1,
        layers: int = 0,
    ):
        self.num_encoded = 0  # inputs, since the start
        self._encoder = encoder
        self._place = place
        self._dtype = dtype
        self._hidden, self._layers = hidden, layers
        self._encoded: dict[bytes, EncodedInput] = {}
        self._features: dict[str, list[bytes]] = {}  # by path, of inputs that are not encoded yet

    def __getitem__(self, key: bytes) -> EncodedInput:
        return self._encoded[key]

    def free(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            del self._encoded[key]

    def put_features(self, features: Features) -> None:
        """Keep the features of an input, which is encoded next, in place of a file of this machine."""
        self._features.setdefault(features.path, []).append(features.data)

    def _read(self, path: str) -> dict[str, Tensor]:
        if path not in self._features:
            return load_file(path)
        received = self._features[path]
        data = received.pop()
        if not received:
            del self._features[path]
        return load(data)

    def encode(self, mm_input: MMInputRef, count: int) -> None:
        """Read the features of an input and encode them. Raises RuntimeError unless there are `count` embeddings."""
        try:
            tensors = self._read(mm_input.features)
        except (OSError, SafetensorError) as error:
            raise RuntimeError(f"the features of a multimodal input can't be read: {error}") from error
        found = self._encoder.encode({name: self._place(tensor) for name, tensor in tensors.items()})
        if len(found.embeddings) != count:
            raise RuntimeError(
                f"the encoder returned {len(found.embeddings)} embeddings for an input with {count} tokens for them"
            )
        self.num_encoded += 1
        kept = found if self._dtype is None else found.to(self._dtype)
        deepstack = None if kept.deepstack is None else _alone(kept.deepstack)
        self._encoded[mm_input.hash] = EncodedInput(_alone(kept.embeddings), deepstack)

    def put_zeros(self, key: bytes, count: int) -> None:
        """Zeros in place of an input that could not be encoded; they take no memory."""
        zeros = self._place(torch.zeros(1 + self._layers, 1, self._hidden, dtype=self._dtype)).expand(-1, count, -1)
        self._encoded[key] = EncodedInput(zeros[0], zeros[1:] if self._layers else None)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it is a part of a larger one, which it would keep in memory."""
    return tensor if tensor.untyped_storage().nbytes() <= tensor.nbytes else tensor.clone()
