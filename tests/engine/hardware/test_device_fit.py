"""A fit to steps of known hardware predicts other steps, and other shapes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.hardware import device_fit
from engine.hardware.description import (
    DecodeAttention,
    DecodeAttentions,
    Gemms,
    GemmTable,
    Hardware,
    read_hardware,
)
from engine.hardware.device_fit import DeviceFit, MeasuredStep, fit_device, step_terms
from engine.hardware.step_time import DecoderShape, StepTime, StepWork
from engine.profiling import CPU_GRID

H100 = read_hardware("h100")
ROWS = CPU_GRID.rows
STEP_S = 0.0004
LARGE = DecoderShape(30, 2048, 8192, 32, 8, 64, 128256)


def made(products: Gemms, attention: DecodeAttention, small_kernels_us: float) -> Hardware:
    """A processor of 40 GB/s and 0.5 TFLOP/s."""
    return replace(
        H100,
        bandwidth_tb_s=replace(H100.bandwidth_tb_s, value=0.04),
        peak_tflops=replace(H100.peak_tflops, bf16=0.5),
        gemm=products,
        attention=replace(H100.attention, decode=DecodeAttentions(attention), prompt=0.5),
        layer=replace(H100.layer, small_kernels_us=small_kernels_us, small_kernels_memory=1.5, eager_us=0),
    )


def true_hardware() -> Hardware:
    times = [max(50.0, 4.2 * rows) for rows in ROWS]
    products = Gemms("kernels", bf16_table=GemmTable(ROWS, tuple(times)))
    return made(products, DecodeAttention(launch_us=0, memory=0.6, compute=1.2, request_us=0.7), 3)


def fitted_hardware(fit: DeviceFit) -> Hardware:
    return replace(
        H100,
        bandwidth_tb_s=replace(H100.bandwidth_tb_s, value=fit.bandwidth / 1e12),
        peak_tflops=replace(H100.peak_tflops, bf16=fit.peak / 1e12),
        gemm=fit.gemm,
        attention=fit.attention,
        layer=fit.layer,
    )


def steps_of(hardware: Hardware, shape: DecoderShape, noise: float, seed: int) -> list[MeasuredStep]:
    random, step_time = np.random.default_rng(seed), StepTime(hardware, shape)
    works = [composition.work(1) for composition in CPU_GRID.compositions]
    return [
        MeasuredStep(shape, work, (step_time.seconds(work) + STEP_S) * (1 + noise * random.standard_normal()))
        for work in works
    ]


@pytest.mark.parametrize(("noise", "largest"), [(0.0, 1e-3), (0.02, 0.04)])
def test_the_fit_predicts_a_shape_that_it_has_not_seen(noise: float, largest: float) -> None:
    hardware = true_hardware()
    steps = [step for i, shape in enumerate(CPU_GRID.shapes) for step in steps_of(hardware, shape, noise, i)]
    fit = fit_device(steps, ROWS)
    assert fit.error <= max(noise, 1e-3)
    predicted = StepTime(fitted_hardware(fit), LARGE)
    for step in steps_of(hardware, LARGE, 0.0, 0):
        assert predicted.seconds(step.work) + fit.step_s == pytest.approx(step.seconds, rel=largest)


def test_known_constants_are_found() -> None:
    hardware = true_hardware()
    fit = fit_device([step for shape in CPU_GRID.shapes for step in steps_of(hardware, shape, 0.0, 0)], ROWS)
    assert fit.step_s == pytest.approx(STEP_S, rel=1e-3)
    assert fit.bandwidth == pytest.approx(2 / 50e-12, rel=1e-3)
    assert fit.layer.small_kernels_us == pytest.approx(3, rel=1e-2)
    assert fit.attention.decode.bf16.request_us == pytest.approx(0.7, rel=1e-2)
    assert fit.attention.prompt * fit.peak == pytest.approx(0.25e12, rel=1e-2)
    table = fit.gemm.bf16_table
    assert table is not None
    assert table.weight_ps == pytest.approx([max(50.0, 4.2 * rows) for rows in ROWS], rel=1e-2)


def test_no_part_beats_the_limits_of_the_machine() -> None:
    """Steps that take the same time whatever they compute are no reason to claim an attention without a cost."""
    shape = CPU_GRID.shapes[0]
    fit = fit_device([MeasuredStep(shape, one.work(1), 0.01) for one in CPU_GRID.compositions], ROWS)
    assert 0 < fit.attention.decode.bf16.memory <= 1
    assert 0 < fit.attention.prompt <= 1
    assert fit.layer.small_kernels_memory > 0


def test_no_steps_are_an_error() -> None:
    with pytest.raises(ValueError, match="no steps"):
        fit_device([], ROWS)


constants = st.floats(0.1, 10)
shapes = st.builds(
    DecoderShape,
    num_layers=st.integers(1, 40),
    hidden_size=st.integers(64, 4096),
    intermediate_size=st.integers(64, 8192),
    num_heads=st.sampled_from([4, 8, 12]),
    num_kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([32, 64, 128]),
    vocab_size=st.integers(100, 150_000),
)
works = st.builds(
    StepWork,
    decodes=st.integers(1, 200),
    context=st.integers(0, 100_000),
    chunks=st.lists(st.tuples(st.integers(2, 600), st.integers(0, 4000)), max_size=3),
    sampled=st.integers(0, 700),
)


@given(
    shape=shapes, work=works, layer=constants, elements=constants, request=constants, kv=constants, decode=constants,
    prompt=constants, slower=st.lists(constants, min_size=len(ROWS), max_size=len(ROWS)),
)  # fmt: skip
def test_the_terms_of_the_fit_are_those_of_the_latency_model(
    shape: DecoderShape, work: StepWork, layer: float, elements: float, request: float, kv: float, decode: float,
    prompt: float, slower: list[float],
) -> None:  # fmt: skip
    weight_ps = np.cumsum(slower)
    hardware = made(
        Gemms("kernels", bf16_table=GemmTable(ROWS, tuple(weight_ps.tolist()))),
        DecodeAttention(launch_us=0, memory=0.1 * kv, compute=decode, request_us=request),
        layer,
    )
    hardware = replace(
        hardware,
        attention=replace(hardware.attention, prompt=0.1 * prompt),
        layer=replace(hardware.layer, small_kernels_memory=elements),
    )
    bandwidth, peak = hardware.bandwidth, hardware.peak_tflops.bf16 * 1e12
    found = np.zeros(len(ROWS) + 7)
    found[: len(ROWS)] = np.array(slower) * 1e-12
    found[device_fit.LAYER], found[device_fit.ELEMENTS] = layer * 1e-6, 1 / (elements * bandwidth)
    found[device_fit.REQUEST], found[device_fit.KV_BYTES] = request * 1e-6, 1 / (0.1 * kv * bandwidth)
    found[device_fit.DECODE_OPERATIONS] = 1 / (decode * peak)
    found[device_fit.PROMPT_OPERATIONS] = 1 / (0.1 * prompt * peak)
    terms = step_terms(MeasuredStep(shape, work, 1.0), ROWS)
    assert terms @ found == pytest.approx(StepTime(hardware, shape).seconds(work), rel=1e-9)
    found[device_fit.STEP] = STEP_S
    assert terms @ found == pytest.approx(StepTime(hardware, shape).seconds(work) + STEP_S, rel=1e-9)
