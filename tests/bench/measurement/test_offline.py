"""Offline points: what is recorded of requests that an engine runs at once."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.measurement.offline import Finished, LLMEngine, OfflinePoint, known_points, with_repeats
from bench.results import RunFiles, utc_now
from bench.workloads import make_workload
from bench.workloads.base import RequestSpec
from tests.tiny import write_tiny


class Counted:
    """An engine with given times, which also counts what it is given."""

    def __init__(self, missing: int = 0):
        self.given: list[Sequence[RequestSpec]] = []
        self._missing = missing
        self.now, self.date = time.perf_counter, utc_now

    def run(self, specs: Sequence[RequestSpec], done: Callable[[], None]) -> list[Finished]:
        self.given.append(specs)
        for _ in specs:
            done()
        return [Finished(10, spec.output_tokens - self._missing, 4, 0.5, 1.0 + i) for i, spec in enumerate(specs)]


def measured(engine: Counted, repeat: int = 0) -> OfflinePoint:
    workload = make_workload({"kind": "random", "input": 10, "output": 3}, 1000)
    return OfflinePoint(engine, workload, "caches on", 6, 7, repeat)


def test_a_point_counts_all_requests_after_a_warm_up(tmp_path: Path) -> None:
    engine, ticks = Counted(), []
    record, requests = measured(engine).run(lambda: ticks.append(1))
    assert [len(specs) for specs in engine.given] == [1, 6]
    assert engine.given[0][0].prompt_ids != engine.given[1][0].prompt_ids
    assert len(ticks) == 6
    assert (record.phase, record.valid, record.completed, record.concurrency) == ("offline", True, 6, 6)
    assert record.achieved_rate == pytest.approx(6 / record.window_s)
    assert record.output_tok_s == pytest.approx(18 / record.window_s)
    assert record.prefix_hit_rate == pytest.approx(0.4)
    assert record.e2e_p50_ms == pytest.approx(3500)
    assert math.isnan(record.itl_p99_ms)
    files = RunFiles(tmp_path)
    files.add_point(record, requests)
    assert known_points(files.read_points(), measured(engine)) is not None
    assert known_points(files.read_points(), measured(engine, repeat=1)) is None


def test_missed_lengths_make_a_point_invalid() -> None:
    record, _ = measured(Counted(missing=1)).run(lambda: None)
    assert not record.valid
    assert record.reason == "6 outputs did not have the requested length"


def test_configurations_see_the_same_requests_and_rounds_others() -> None:
    first, second, third = Counted(), Counted(), Counted()
    measured(first).run(lambda: None)
    measured(second).run(lambda: None)
    measured(third, repeat=1).run(lambda: None)
    assert first.given[1] == second.given[1] != third.given[1]


def test_a_workload_for_each_share_of_repetitions() -> None:
    assert with_repeats({"kind": "images"}, [0, 50]) == [
        {"kind": "images", "repeat": 0},
        {"kind": "images", "repeat": 50},
    ]
    assert with_repeats({"kind": "images"}, []) == [{"kind": "images"}]


def test_the_engine_itself(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    with LLMEngine(folder, load_format="dummy", max_model_len=64, kernels="torch") as engine:
        specs = [RequestSpec(3, 4, prompt_ids=[5, 6, 7]), RequestSpec(2, 2, prompt_ids=[8, 9])]
        finished = engine.run(specs, lambda: None)
        assert [(one.prompt_tokens, one.output_tokens) for one in finished] == [(3, 4), (2, 2)]
        assert all(0 < one.first_token_s <= one.end_s for one in finished)
        with pytest.raises(BenchError, match="mixes chats and prompts"):
            engine.run([specs[0], RequestSpec(1, 1, messages=[])], lambda: None)
