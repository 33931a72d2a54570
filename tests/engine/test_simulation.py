"""The engine that `redline bench`, `sweep` and `plan` simulate."""

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.engine_plan import plan_engine
from engine.hardware.simulation import Simulation
from engine.hardware.start import simulated_executor
from engine.simulation import with_short_messages

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
