"""The engine that `redline bench`, `sweep` and `plan` simulate."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.data import datasets_folder
from engine.engine_plan import plan_engine
from engine.hardware.images import SimulatedImage
from engine.hardware.simulation import Simulation
from engine.hardware.start import simulated_executor
from engine.simulation import SimulatedEngine, simulate, with_short_messages

LLAMA = "meta-llama/Meta-Llama-3.1-8B-Instruct"


@pytest.mark.parametrize("flags", [{"engine": "v0"}, {"ablate": ("full-state",)}])
def test_the_length_of_messages_has_no_influence_on_simulated_times(flags: dict) -> None:
    plan = plan_engine(EngineConfig(model=LLAMA, device="sim:h100", max_model_len=512, max_num_seqs=8, **flags))
    resolved = plan.resolution.config
    short = with_short_messages(resolved)
    assert "full-state" in resolved.ablations
    assert "full-state" not in short.ablations
    ends = []
    for config in (resolved, short):
        # The executor is that of the configuration as given, as the costs of its host are.
        server = Simulation(
            config, lambda clock: simulated_executor(plan.config, resolved, plan.model_info, clock), request_s=0.01
        )
        replies = []
        for number in range(20):
            replies.append(server.submit(np.full(100 + number, number, np.int32), 30 + number % 7))
            server.run_until(server.now() + 0.02)
        while not all(reply.ended for reply in replies):
            server.run_until(server.now() + 10)
        server.take(replies)
        ends.append([(one.times.first_s, one.times.last_s) for one in replies if one.times is not None])
    assert len(ends[0]) == 20
    assert ends[0] == ends[1]
    assert with_short_messages(short) is short


def vision(device: str = "sim:h100", **options: Any) -> SimulatedEngine:
    return simulate(EngineConfig(model="qwen2-vl-7b", device=device, max_model_len=4096, **options))


def first_token(engine: SimulatedEngine) -> float:
    """Of a request with an image of 0.8 megapixels."""
    server = engine.simulation
    reply = server.submit([1, 2, 3], 2, [SimulatedImage(1000, 800, b"cat")])
    while not reply.ended:
        server.run_until(server.now() + 1)
    server.take([reply])
    assert reply.times is not None
    return reply.times.first_s


def test_the_processes_of_images_are_recorded() -> None:
    usual, one, v0 = vision(), vision(mm_processors=1), vision(engine="v0")
    assert (usual.resolved["mm_processors"], one.resolved["mm_processors"]) == (8, 1)
    assert usual.described.endswith("tokens of KV cache, 8 processes for images")
    assert one.described.endswith(", 1 process for images")
    for without in (v0, simulate(EngineConfig(model=LLAMA, device="sim:h100", max_model_len=512))):
        assert "mm_processors" not in without.resolved
        assert without.described.endswith("tokens of KV cache")


def test_without_times_of_processing_images_are_served_at_once(tmp_path: Path) -> None:
    path, lines = tmp_path / "mine.yaml", (datasets_folder() / "hardware" / "h100.yaml").read_text().splitlines()
    left = [line for line in lines if not line.startswith("  processing: {")]
    assert len(left) == len(lines) - 1
    path.write_text("\n".join(left))
    assert first_token(vision()) - first_token(vision(f"sim:{path}")) == pytest.approx(0.065 * 0.8)
