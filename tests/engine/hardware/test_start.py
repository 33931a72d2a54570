"""The executor of a configuration has the times of its model, its ranks and its engine."""

from typing import Any

import pytest

from engine.config import EngineConfig
from engine.engine_plan import plan_engine
from engine.hardware.description import read_hardware
from engine.hardware.shape import decoder_shape
from engine.hardware.start import simulated_executor, used_hardware
from engine.hardware.step_time import DecoderShape
from engine.hardware.virtual_engine import VirtualClock, VirtualEngine
from engine.messages import AddRequest, Outputs, Sampling, decode_from_core, encode
from tests.simulated_server import run_engine


def shape(**options: Any) -> DecoderShape:
    plan = plan_engine(EngineConfig(model="llama-3.1-8b", device="sim:h100", **options))
    return decoder_shape(plan.config, plan.model_info)


def test_the_shape_is_that_of_the_whole_model() -> None:
    assert shape() == shape(tensor_parallel_size=4) == DecoderShape(32, 4096, 14336, 32, 8, 128, 128256)
    fp8 = shape(quantization="fp8", kv_cache_dtype="fp8")
    assert (fp8.gemm_dtype, fp8.kv_dtype) == ("fp8", "fp8")


def seconds(engine: str = "v1", **options: Any) -> float:
    """Of a request of 200 tokens after 100."""
    plan = plan_engine(
        EngineConfig(model="llama-3.1-8b", device="sim:h100", max_model_len=4096, engine=engine, **options)
    )
    clock, ended, resolved = VirtualClock(), list[float](), plan.resolution.config
    executor = simulated_executor(plan.config, resolved, plan.model_info, clock)

    def send(_: int, data: bytes) -> None:
        message = decode_from_core(data)
        if isinstance(message, Outputs):
            ended.extend(message.at for _ in message.finished)

    virtual = VirtualEngine(resolved, executor, clock, send)
    virtual.core.receive(encode(AddRequest(1, bytes(4 * 100), 200, Sampling())))
    run_engine(virtual, clock, 10)
    (end,) = ended
    return end


def test_what_engine_and_options_cost() -> None:
    v1, waiting, v0 = seconds(), seconds(ablate=("no-run-ahead",)), seconds("v0")
    assert v1 < waiting < v0
    assert seconds(tensor_parallel_size=2) < v1
    assert seconds(tensor_parallel_size=4) < seconds(tensor_parallel_size=4, enforce_eager=True)
    assert seconds(quantization="fp8") < v1
    assert seconds("v0", tensor_parallel_size=4) < v0


def test_eager_steps_are_not_captured() -> None:
    config = EngineConfig(model="llama-3.1-8b", device="sim:h100", enforce_eager=True)
    assert used_hardware(config).layer.captured_tokens == 0
    assert read_hardware("h100").layer.captured_tokens == 512


def test_full_state_steps_are_understood() -> None:
    assert seconds(ablate=("full-state",)) == pytest.approx(seconds(ablate=("no-run-ahead",)))
