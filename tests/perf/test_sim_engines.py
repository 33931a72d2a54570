"""Other engines are data that changes a description of hardware."""

from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.hardware.description import hardware_names, read_hardware
from engine.hardware.step_time import DecoderShape, StepTime, StepWork
from tests.perf import sim_engines
from tests.perf.sim_engines import FOLDER, engine_names, read_engine

SHAPE = DecoderShape(32, 4096, 14336, 32, 8, 128, 128256, gemm_dtype="fp8", kv_dtype="fp8")
DECODES = StepWork(decodes=32, context=64_000, sampled=32)


@pytest.mark.parametrize("hardware", hardware_names())
@pytest.mark.parametrize("name", engine_names())
def test_every_engine_works_on_every_hardware(name: str, hardware: str) -> None:
    engine, described = read_engine(name), read_hardware(hardware)
    used = engine.on(described)
    assert used.host.v1 == engine.host
    assert used.layer.small_kernels_us == engine.kernels.small_kernels_us
    assert used.gemm.bf16 == described.gemm.bf16
    assert (used.gemm.fp8 is None) == (described.gemm.fp8 is None)


def test_kernels_that_cost_less_make_steps_shorter() -> None:
    described, engine = read_hardware("h200"), read_engine("trtllm")
    assert engine.whole_requests
    without, with_engine = StepTime(described, SHAPE, 4), StepTime(engine.on(described), SHAPE, 4)
    assert with_engine.seconds(DECODES) < without.seconds(DECODES)


def test_the_order_of_prompts_and_decodes_is_an_ablation() -> None:
    assert read_engine("sglang").ablations == ("prefill-first",)


def test_unknown_engines_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"no engine tgi is known; known are v1, v0, sglang, trtllm"):
        read_engine("tgi")


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("serial:", "overlap:", "unknown field `overlap`"),
        ("source: steps", "source: web", "sources has no web"),
    ],
)
def test_errors_name_the_file(old: str, new: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (FOLDER / "sglang.yaml").read_text()
    assert old in text
    (tmp_path / "other.yaml").write_text(text.replace(old, new, 1))
    monkeypatch.setattr(sim_engines, "FOLDER", tmp_path)
    with pytest.raises(ConfigError, match=rf"other\.yaml.*{error}"):
        read_engine("other")
