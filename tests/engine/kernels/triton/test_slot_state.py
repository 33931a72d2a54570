"""What the device keeps for each slot, against numpy; padded entries (index -1) are neither read nor written."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.triton.slot_state import UNKNOWN, append_tokens, gather_ids, write_elements, write_rows
from tests.engine.kernels.triton.numbers import poisoned


@settings(settings.get_profile("triton"))
@given(tokens=st.integers(0, 600), slots=st.integers(1, 40), seed=st.integers(0, 100))
def test_unknown_ids_are_the_newest_tokens_of_their_slots(tokens: int, slots: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    last = rng.integers(0, 1000, slots).astype(np.int32)
    slot_of = rng.integers(-1, slots, tokens).astype(np.int32)
    ids = rng.integers(0, 1000, tokens).astype(np.int32)
    ids[rng.random(tokens) < 0.5] = UNKNOWN
    expected = np.where(slot_of < 0, 0, np.where(ids == UNKNOWN, last[slot_of], ids))
    memory = poisoned(tokens + 2, dtype=torch.int32)
    memory[:tokens] = torch.from_numpy(ids)
    gather_ids(memory[:tokens], torch.from_numpy(last), torch.from_numpy(slot_of))
    assert memory[:tokens].tolist() == expected.tolist()
    assert (memory[tokens:] == poisoned(2, dtype=torch.int32)).all()


@settings(settings.get_profile("triton"))
@given(n=st.integers(0, 300), seed=st.integers(0, 100))
def test_appended_tokens_are_gathered_by_the_next_step(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    slots = rng.permutation(400)[:n].astype(np.int32)
    padding = rng.random(n) < 0.2
    slots[padding] = -1
    tokens, last = torch.from_numpy(rng.integers(0, 10**5, n).astype(np.int32)), poisoned(400, dtype=torch.int32)
    append_tokens(last, torch.from_numpy(slots), tokens)
    ids = torch.full((n,), UNKNOWN, dtype=torch.int32)
    gather_ids(ids, last, torch.from_numpy(slots))
    assert ids.tolist() == np.where(padding, 0, tokens).tolist()
    untouched = np.setdiff1d(np.arange(400), slots)
    assert (last[untouched] == poisoned(1, dtype=torch.int32)).all()


@settings(settings.get_profile("triton"))
@given(
    n=st.integers(0, 20), width=st.sampled_from([1, 3, 8, 300, 1030]), floats=st.booleans(), seed=st.integers(0, 100)
)
def test_rows_of_a_table_are_written(n: int, width: int, floats: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dtype = torch.float32 if floats else torch.int32
    memory = poisoned(30, width + 2, dtype=dtype)  # the table is a view of something wider
    expected = memory.clone()
    rows = rng.permutation(30)[:n].astype(np.int32)
    rows[rng.random(n) < 0.3] = -1
    values = torch.from_numpy(rng.integers(-99, 99, (n, width))).to(dtype)
    write_rows(memory[:, :width], torch.from_numpy(rows), values)
    expected[rows[rows >= 0], :width] = values[rows >= 0]
    torch.testing.assert_close(memory, expected, rtol=0, atol=0, equal_nan=True)


@settings(settings.get_profile("triton"))
@given(n=st.integers(0, 600), floats=st.booleans(), seed=st.integers(0, 100))
def test_elements_of_a_table_are_written(n: int, floats: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dtype = torch.float32 if floats else torch.int32
    table = poisoned(40, 20, dtype=dtype)
    rows, columns = np.divmod(rng.permutation(40 * 20)[:n].astype(np.int32), 20)
    rows[rng.random(n) < 0.3] = -1
    values = torch.from_numpy(rng.integers(-99, 99, n)).to(dtype)
    expected = table.clone()
    expected[rows[rows >= 0], columns[rows >= 0]] = values[rows >= 0]
    write_elements(table, torch.from_numpy(rows), torch.from_numpy(columns), values)
    torch.testing.assert_close(table, expected, rtol=0, atol=0, equal_nan=True)


def test_dtypes_must_be_the_tables() -> None:
    one = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"float32 can't be written into a table of torch\.int32"):
        write_rows(torch.zeros(2, 2, dtype=torch.int32), one, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="contiguous"):
        write_elements(torch.zeros(2, 2).T, one, one, torch.zeros(1))
