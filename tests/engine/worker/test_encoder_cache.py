"""The embeddings on a worker's device."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor

from engine.messages import MMInputRef
from engine.model.encoders.base import EncodedInput
from engine.worker.encoder_cache import EncoderCache


class Doubling:
    """The embeddings are twice the features."""

    def encode(self, tensors: Mapping[str, Tensor]) -> EncodedInput:
        return EncodedInput(2 * tensors["values"])


@pytest.fixture
def ref(tmp_path: Path) -> MMInputRef:
    save_file({"values": np.arange(6, dtype=np.float32).reshape(3, 2)}, tmp_path / "features")
    return MMInputRef(b"key", 4, 5, features=str(tmp_path / "features"))


def test_an_input_is_encoded_and_freed(ref: MMInputRef) -> None:
    cache = EncoderCache(Doubling())
    cache.encode(ref, 3)
    assert torch.equal(cache[b"key"].embeddings, torch.tensor([[0.0, 2], [4, 6], [8, 10]]))
    assert cache.num_encoded == 1
    cache.free([b"key"])
    with pytest.raises(KeyError):
        cache[b"key"]


def test_features_are_copied_to_the_device(ref: MMInputRef) -> None:
    placed: list[Tensor] = []

    def place(tensor: Tensor) -> Tensor:
        placed.append(tensor)
        return tensor + 1

    cache = EncoderCache(Doubling(), place)
    cache.encode(ref, 3)
    assert len(placed) == 1
    assert cache[b"key"].embeddings[0].tolist() == [2, 4]


def test_another_number_of_embeddings_is_a_fault(ref: MMInputRef) -> None:
    with pytest.raises(RuntimeError, match="returned 3 embeddings for an input with 4 tokens"):
        EncoderCache(Doubling()).encode(ref, 4)


def test_missing_features_are_a_fault(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="can't be read"):
        EncoderCache(Doubling()).encode(MMInputRef(b"key", 0, 1, features=str(tmp_path / "gone")), 1)


def test_embeddings_keep_nothing_else_in_memory(ref: MMInputRef) -> None:
    class Part:
        def encode(self, tensors: Mapping[str, Tensor]) -> EncodedInput:
            return EncodedInput(torch.zeros(100, 2)[:3], torch.zeros(1, 100, 2)[:, :3])

    cache = EncoderCache(Part())
    cache.encode(ref, 3)
    found = cache[b"key"]
    assert found.embeddings.untyped_storage().nbytes() == 3 * 2 * 4
    assert found.deepstack is not None
    assert found.deepstack.untyped_storage().nbytes() == 3 * 2 * 4
