"""Headers of safetensors files, and reading parts of tensors."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.errors import ModelError
from engine.model.checkpoints import reader
from engine.model.checkpoints.reader import Reader
from engine.model.checkpoints.safetensors_headers import INDEX, read_headers


def write(folder: Path, **tensors: torch.Tensor) -> None:
    save_file(tensors, folder / "model.safetensors")


def test_headers_tell_names_kinds_and_shapes(tmp_path: Path) -> None:
    write(tmp_path, a=torch.zeros(2, 3, dtype=torch.bfloat16), b=torch.zeros(0, dtype=torch.int8))
    found = read_headers(tmp_path, "m")
    assert {name: (one.dtype, one.shape, one.nbytes) for name, one in found.items()} == {
        "a": ("bfloat16", (2, 3), 12),
        "b": ("int8", (0,), 0),
    }


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda data: data[:5], "isn't a safetensors file"),
        (lambda data: data[:30], "it ends within its header"),
        (lambda data: data[:-1], "bytes of"),
        (lambda data: b"\x05\x00\x00\x00\x00\x00\x00\x00[1,2]", "isn't a safetensors file"),
        (lambda data: data.replace(b'"F32"', b'"X32"'), "X32"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(break_it, says: str, tmp_path: Path) -> None:
    write(tmp_path, a=torch.zeros(64))
    file = tmp_path / "model.safetensors"
    file.write_bytes(break_it(file.read_bytes()))
    with pytest.raises(ModelError, match=r"m: model\.safetensors") as caught:
        read_headers(tmp_path, "m")
    assert says in str(caught.value)


def test_a_header_is_read_once_until_its_file_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, load = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text: reads.append(text) or load(text))
    for length in (2, 3):
        write(tmp_path, a=torch.zeros(length))
        assert read_headers(tmp_path, "m")["a"].shape == (length,)
        assert read_headers(tmp_path, "m") == read_headers(tmp_path, "m")
    assert len(reads) == 2


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(ModelError, match=r"model-00001-of-00001\.safetensors is missing"):
        read_headers(tmp_path, "m")


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="convert it to safetensors"):
        read_headers(tmp_path, "m")


boxes = st.lists(st.integers(1, 7), min_size=1, max_size=3).flatmap(
    lambda shape: st.tuples(
        st.just(shape),
        st.tuples(
            *(st.integers(0, n - 1).flatmap(lambda b, n=n: st.tuples(st.just(b), st.integers(1, n - b))) for n in shape)
        ),
    )
)


@settings(deadline=None)
@given(
    boxes,
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([torch.float32, torch.float16]),
    st.integers(1, 64),
)
def test_any_part_is_read_as_a_slice_would_be(box, stored: torch.dtype, to: torch.dtype, band: int) -> None:
    import tempfile
    from unittest.mock import patch

    shape, ranges = box
    values = torch.arange(torch.Size(shape).numel()).view(shape).to(stored)
    with tempfile.TemporaryDirectory() as folder, patch.object(reader, "BAND", band):
        write(Path(folder), before=torch.zeros(3, dtype=torch.int8), a=values)
        wanted = values[tuple(slice(b, b + n) for b, n in ranges)].to(to)
        out = torch.full(wanted.shape, -1, dtype=to)
        source = Reader()
        source.copy(read_headers(Path(folder), "m")["a"], tuple(b for b, _ in ranges), out)
        source.close()
    assert torch.equal(out, wanted)


def test_a_scalar_is_read(tmp_path: Path) -> None:
    write(tmp_path, a=torch.tensor(2.5))
    out = torch.zeros(())
    Reader().copy(read_headers(tmp_path, "m")["a"], (), out)
    assert out == 2.5
