"""Products with int8 and int4 weights against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.triton import quantized
from engine.kernels.triton.quantized import (
    FEW_ROWS,
    GROUPS,
    INPUTS_PER_STEP,
    MAX_SPLITS,
    OUTPUTS_PER_PROGRAM,
    PARTIALS,
    LinearWorkspace,
    convert,
    count_splits,
    linear,
    pack_integers,
)
from tests.engine.kernels.triton.numbers import DTYPES, poisoned, random_numbers
from tests.engine.kernels.triton.quantized_case import TOLERANCE, check_product, random_weight, workspace

KINDS = ("int8", "int4")


@settings(settings.get_profile("triton"))
@given(
    rows=st.sampled_from([0, 1, 3, 16, 17, 64, 65, 90]),
    outputs=st.sampled_from([1, 48, 130]),
    groups=st.integers(1, 9),
    kind=st.sampled_from(KINDS),
    group=st.sampled_from(GROUPS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 100),
)
def test_products_are_those_of_the_weights(
    rows: int, outputs: int, groups: int, kind: str, group: int, dtype: torch.dtype, seed: int
) -> None:
    check_product(rows, outputs, groups, kind, group, dtype, seed)


@pytest.mark.parametrize(("kind", "group"), [("int8", 64), ("int4", 32), ("int4", 128)])
def test_inputs_divided_among_programs(kind: str, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "count_splits", lambda blocks, steps: 4)
    weight, exact = random_weight(kind, 70, 640, group, 1)
    x, out = random_numbers(5, 640, seed=2), poisoned(5, 70)
    linear(x, weight, out, workspace(torch.float32))
    torch.testing.assert_close(out.double(), x.double() @ exact.T, **TOLERANCE[torch.float32])
    with pytest.raises(ValueError, match="not 1400"):
        linear(x, weight, out, LinearWorkspace(torch.empty(1399), torch.empty(1)))


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_convert_as_many_outputs_as_the_workspace_holds(kind: str) -> None:
    weight, exact = random_weight(kind, 50, 128, 64, 3)
    x, out = random_numbers(70, 128, seed=4), poisoned(70, 50)
    linear(x, weight, out, workspace(torch.float32, weights=128 * 16 + 5))  # 16 outputs, four times
    torch.testing.assert_close(out.double(), x.double() @ exact.T, **TOLERANCE[torch.float32])
    with pytest.raises(ValueError, match="no room"):
        linear(x, weight, out, workspace(torch.float32, weights=127))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_converted_weights(kind: str, group: int, dtype: torch.dtype) -> None:
    weight, exact = random_weight(kind, 9, 384, group, 5)
    memory = poisoned(6, 384, dtype=dtype)
    convert(weight, memory[:5], first=3)
    torch.testing.assert_close(memory[:5].double(), exact[3:8], rtol=2**-6, atol=1e-6)
    assert memory[5:].isnan().all()


@pytest.mark.parametrize(
    ("outputs", "inputs"), [(6144, 4096), (4096, 14336), (28672, 4096), (128256, 4096), (32, 1 << 20)]
)
def test_partial_sums_fit_the_workspace(outputs: int, inputs: int) -> None:
    blocks = -(-outputs // OUTPUTS_PER_PROGRAM)
    splits = count_splits(blocks, -(-inputs // INPUTS_PER_STEP))
    assert splits == 1 or splits * FEW_ROWS * outputs <= PARTIALS


def test_the_bytes_of_a_workspace() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        made = LinearWorkspace.allocate(lambda shape, of: torch.empty(shape, dtype=of), dtype)
        assert made.partials.nbytes + made.weights.nbytes == LinearWorkspace.bytes(dtype.itemsize)


def test_a_group_has_its_halves_in_the_low_and_the_high_bits() -> None:
    integers = torch.zeros(1, 64, dtype=torch.uint8)
    integers[0, 32:] = torch.arange(32, dtype=torch.uint8) % 16
    packed = pack_integers(integers, torch.ones(1, 2), torch.zeros(1, 2))
    assert packed.group == 32
    assert packed.integers[0, :16].tolist() == [0] * 16
    assert packed.integers[0, 16:].tolist() == [i | i << 4 for i in range(16)]


def test_inputs_are_divided_only_as_far_as_it_helps() -> None:
    assert count_splits(blocks=896, steps=32) == 1, "outputs alone make enough programs"
    assert count_splits(blocks=128, steps=32) == 4
    assert count_splits(blocks=32, steps=256) == MAX_SPLITS
    assert count_splits(blocks=32, steps=7) == 1, "a program has at least 4 steps"


def test_wrong_shapes_are_refused() -> None:
    weight, _ = random_weight("int4", 8, 64, 32, 0)
    with pytest.raises(ValueError, match=r"\(2, 60\) times \(8, 64\)"):
        linear(torch.ones(2, 60), weight, torch.ones(2, 8), workspace(torch.float32))
    with pytest.raises(ValueError, match="groups of 32, 64, 128 inputs, not 16"):
        pack_integers(torch.zeros(1, 64, dtype=torch.uint8), torch.ones(1, 4), torch.ones(1, 4))
