"""Times of steps follow from what the steps compute."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.hardware.description import read_hardware
from engine.hardware.gemm import GemmModel
from engine.hardware.step_time import DecoderShape, StepTime, StepWork, all_reduce_seconds

H100 = read_hardware("h100")
LLAMA_8B = DecoderShape(32, 4096, 14336, 32, 8, 128, 128256)


def test_a_product_is_bound_by_its_weights_or_by_its_operations() -> None:
    products = GemmModel(H100, "bf16")
    weights = 2 * 4096 * 14336 / 3.35e12
    assert weights < products.seconds(1, 4096, 14336) < 1.5 * weights
    operations = 2 * 8192 * 4096 * 14336 / 989e12
    assert operations < products.seconds(8192, 4096, 14336) < 1.5 * operations


@given(
    m=st.integers(1, 10_000),
    k=st.integers(64, 30_000),
    n=st.integers(64, 200_000),
    dtype=st.sampled_from(["bf16", "fp8"]),
)
def test_products_never_beat_the_data_sheet(m: int, k: int, n: int, dtype: str) -> None:
    itemsize, peak = (2, 989e12) if dtype == "bf16" else (1, 1979e12)
    least = max(2 * m * n * k / peak, (itemsize * (n * k + m * k) + 2 * m * n) / 3.35e12)
    assert GemmModel(H100, dtype).seconds(m, k, n) >= least


def test_a_decode_step_of_one_request_takes_as_long_as_reading_the_weights() -> None:
    weights = 2 * (32 * 4096 * (6144 + 4096 + 3 * 14336) + 4096 * 128256) / 3.35e12
    seconds = StepTime(H100, LLAMA_8B).seconds(StepWork(decodes=1, context=100, sampled=1))
    assert 1.2 * weights < seconds < 1.6 * weights


works = st.builds(
    StepWork,
    decodes=st.integers(0, 256),
    context=st.integers(0, 500_000),
    chunks=st.lists(st.tuples(st.integers(2, 8192), st.integers(0, 30_000)), max_size=4),
    sampled=st.integers(0, 256),
)


@given(work=works, more=st.integers(1, 4096))
def test_more_work_never_takes_less_time(work: StepWork, more: int) -> None:
    step_time = StepTime(H100, LLAMA_8B)
    seconds = step_time.seconds(work)
    assert step_time.seconds(StepWork(work.decodes, work.context + more, work.chunks, work.sampled)) >= seconds
    assert step_time.seconds(StepWork(work.decodes, work.context, [*work.chunks, (more, 0)], work.sampled)) >= seconds
    assert step_time.seconds(StepWork(work.decodes, work.context, work.chunks, work.sampled + more)) >= seconds


def test_ranks_divide_a_prompt() -> None:
    work = StepWork(chunks=[(8192, 0)], sampled=1)
    one, four = (StepTime(H100, LLAMA_8B, ranks).seconds(work) for ranks in (1, 4))
    assert one / 4 < four < one / 2


def test_steps_that_are_not_captured_wait_for_their_launches() -> None:
    small = DecoderShape(32, 256, 512, 8, 8, 32, 1000)
    step_time = StepTime(H100, small)
    captured = step_time.seconds(StepWork(chunks=[(512, 0)], sampled=1))
    assert captured < 32 * 115e-6
    assert step_time.seconds(StepWork(chunks=[(513, 0)], sampled=1)) == pytest.approx(32 * 115e-6)


def test_an_all_reduce_is_interpolated_in_logarithms() -> None:
    table = H100.all_reduce
    assert all_reduce_seconds(table, 1, 1_000_000) == 0
    assert all_reduce_seconds(table, 2, 1) == all_reduce_seconds(table, 2, 8192) == pytest.approx(2.9e-6)
    assert all_reduce_seconds(table, 2, 1 << 20) == pytest.approx((5.5 * 13) ** 0.5 * 1e-6)
    assert all_reduce_seconds(table, 4, 2 * 33_554_432) == pytest.approx(2 * 213e-6)


def test_what_the_hardware_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="A100 SXM 80 GB has no products in fp8"):
        StepTime(read_hardware("a100"), DecoderShape(32, 4096, 14336, 32, 8, 128, 128256, gemm_dtype="fp8"))
    with pytest.raises(
        ConfigError, match=r"--tp 3 is not possible: 32 heads on .* can be divided over 1, 2, 4, 8 ranks"
    ):
        StepTime(H100, LLAMA_8B, 3)
