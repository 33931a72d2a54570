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
    IntegerWeight,
    LinearWorkspace,
    convert,
    count_splits,
    linear,
    pack_integers,
)
from tests.engine.kernels.triton.numbers import DTYPES, poisoned, random_numbers

KINDS = ("int8", "int4")
# Of one rounding of the result; float32 sums of some hundred products, whose terms are larger than their sum.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-4},
    torch.float16: {"rtol": 2**-10, "atol": 1e-3},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-3},
}


def random_weight(kind: str, outputs: int, inputs: int, group: int, seed: int) -> tuple[IntegerWeight, torch.Tensor]:
    """A weight and its numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    scales = (torch.rand(outputs, inputs // group, generator=generator) / 8).bfloat16()
    if kind == "int8":
        integers = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
        exact = integers.double().unflatten(1, (-1, group)) * scales.double()[..., None] / 16
        return pack_integers(integers, scales / 16, None), exact.flatten(1)
    integers = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, generator=generator)
    minimums = (-torch.rand(outputs, inputs // group, generator=generator)).bfloat16()
    exact = integers.double().unflatten(1, (-1, group)) * scales.double()[..., None] + minimums.double()[..., None]
    return pack_integers(integers, scales, minimums), exact.flatten(1)


def workspace(dtype: torch.dtype, weights: int = 1 << 16) -> LinearWorkspace:
    return LinearWorkspace(poisoned(MAX_SPLITS * FEW_ROWS * 200), poisoned(weights, dtype=dtype))


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
    inputs = groups * group
    weight, exact = random_weight(kind, outputs, inputs, group, seed)
    x = poisoned(rows, inputs + 3, dtype=dtype)  # rows are apart
    x[:, :inputs] = random_numbers(rows, inputs, seed=seed).to(dtype)
    memory = poisoned(rows + 2, outputs, dtype=dtype)
    linear(x[:, :inputs], weight, memory[:rows], workspace(dtype))
    expected = x[:, :inputs].double() @ exact.T
    tolerance = TOLERANCE[dtype]
    if rows > FEW_ROWS and dtype != torch.float32:  # the weights are rounded as well
        tolerance = {"rtol": tolerance["rtol"], "atol": 4 * tolerance["rtol"] * inputs**0.5}
    torch.testing.assert_close(memory[:rows].double(), expected, **tolerance)
    assert memory[rows:].isnan().all()


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
