"""The arrays of a step in one buffer, and devices of any type."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.worker.torch_device import ALIGNMENT, StagedColumns, TorchDevice

KINDS = ("int32", "int64", "int16", "uint8", "float32", "float64", "bool")


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.lists(st.integers(0, 4), min_size=1, max_size=2)), max_size=6))
def test_arrays_come_back_from_one_aligned_buffer(shapes: list[tuple[str, list[int]]]) -> None:
    columns = {str(i): np.arange(np.prod(shape)).reshape(shape).astype(kind) for i, (kind, shape) in enumerate(shapes)}
    staged = StagedColumns(columns)
    buffer = torch.full((staged.nbytes,), 0xA5, dtype=torch.uint8)
    staged.write(buffer)
    views = staged.views(buffer)
    assert list(views) == list(columns)
    for name, column in columns.items():
        assert views[name].dtype == torch.from_numpy(column).dtype
        assert views[name].shape == column.shape
        assert np.array_equal(views[name].numpy(), column)
        assert views[name].storage_offset() * column.itemsize % ALIGNMENT == 0


def test_arrays_need_not_be_contiguous() -> None:
    column = np.arange(12, dtype=np.int32).reshape(3, 4).T
    found = TorchDevice("cpu").put({"column": column})["column"]
    assert np.array_equal(found.numpy(), column)


def test_arrays_of_one_step_outlive_the_next_on_a_device_without_captures() -> None:
    device = TorchDevice("cpu")
    first = device.put({"ids": np.arange(4)})["ids"]
    device.put({"ids": np.zeros(4, dtype=np.int64), "more": np.zeros(10_000)})
    assert first.tolist() == [0, 1, 2, 3]


def test_what_is_fetched_may_be_overwritten() -> None:
    device = TorchDevice("cpu")
    tokens = device.place(torch.arange(3))
    fetched = device.fetch(tokens)
    tokens.zero_()
    assert fetched.ready()
    assert fetched.wait().tolist() == [0, 1, 2]


def test_a_placed_tensor_is_a_copy() -> None:
    host = torch.arange(3)
    placed = TorchDevice("cpu").place(host)
    host.zero_()
    assert placed.tolist() == [0, 1, 2]


def test_ranks_need_a_group_for_their_device() -> None:
    with pytest.raises(ConfigError, match="--tp 2 does not work on meta"):
        TorchDevice("meta").join(0, 2, "store")
