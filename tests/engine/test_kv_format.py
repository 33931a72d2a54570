"""Blocks outside of the KV cache: what was packed is read again, and everything else is refused by its name."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.kv_format import (
    HEADER_BYTES,
    MAX_KEY_BYTES,
    CorruptBlockError,
    ForeignBlockError,
    KVBlockError,
    KVLayout,
    TruncatedBlockError,
    pack_header,
    read_header,
)

LAYOUT = KVLayout(
    model="m", dtype="bfloat16", cache_dtype="int8", kernels="avx2, fused stack", windows=(0, 9), block_size=16,
    part_bytes=(24, 16),
)  # fmt: skip
HERE = LAYOUT.fingerprint

keys = st.binary(max_size=MAX_KEY_BYTES)
payloads = st.lists(st.binary(max_size=40), min_size=1, max_size=4)


@given(keys, payloads)
def test_a_block_is_read_as_it_was_packed(key: bytes, parts: list[bytes]) -> None:
    data = pack_header(HERE, key, parts)
    assert len(data) == HEADER_BYTES
    header = read_header(data, HERE, key)
    assert (header.key, header.payload_bytes) == (key, sum(map(len, parts)))
    header.check(parts)
    header.check([memoryview(b"".join(parts))])  # however it is divided


@given(keys, payloads, st.data())
def test_a_changed_bit_is_found(key: bytes, parts: list[bytes], data: st.DataObject) -> None:
    whole = bytearray(pack_header(HERE, key, parts) + b"".join(parts))
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    whole[bit // 8] ^= 1 << bit % 8
    with pytest.raises((CorruptBlockError, ForeignBlockError)):
        read_header(bytes(whole[:HEADER_BYTES]), HERE, key).check([whole[HEADER_BYTES:]])


@given(keys, payloads, st.data())
def test_a_cut_block_is_found(key: bytes, parts: list[bytes], data: st.DataObject) -> None:
    whole = pack_header(HERE, key, parts) + b"".join(parts)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(TruncatedBlockError):
        read_header(cut[:HEADER_BYTES], HERE, key).check([cut[HEADER_BYTES:]])


@given(st.binary(max_size=2 * HEADER_BYTES))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(KVBlockError):
        read_header(data, HERE)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"}, {"dtype": "float32"}, {"cache_dtype": "bfloat16"}, {"kernels": "torch"}, {"windows": (0,)},
        {"block_size": 32}, {"part_bytes": (16, 24)}, {"part_bytes": (40,)},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_block_of_another_layout_is_foreign(change: dict[str, object]) -> None:
    other = dataclasses.replace(LAYOUT, **change).fingerprint
    with pytest.raises(ForeignBlockError, match="another model, format, kernels or ranks"):
        read_header(pack_header(other, b"key", [b"part"]), HERE)


def test_another_block_is_foreign() -> None:
    with pytest.raises(ForeignBlockError, match=f"{b'one'.hex()} instead of {b'two'.hex()}"):
        read_header(pack_header(HERE, b"one", [b"part"]), HERE, b"two")
