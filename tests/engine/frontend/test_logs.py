"""What the log says of traffic and of each request."""

import logging

import msgspec
import pytest

from engine.frontend.listener import OutputRecord
from engine.frontend.logs import StatsLog, log_request
from engine.frontend.sampling_params import SamplingParams
from engine.frontend.streams import Origin
from engine.messages import Admitted, Dead, Finished, FinishReason
from engine.stats import Stats
from tests.engine.frontend.test_core_client import Core, Listener, text_ids

ORIGIN = Origin("cmpl-7", "tiny", "10.0.0.1:5000")


def test_the_line_is_about_its_interval():
    lines = StatsLog(0.0, Stats())
    busy = Stats(
        running=3, waiting=1, kv_cache_usage=0.5, preemptions=2, prefix_queries=200, prefix_hits=50, prompt_tokens=200,
        generation_tokens=1000,
    )  # fmt: skip
    line = lines.line(10.0, busy)
    assert line == (
        "prompt 20.0 tok/s, generation 100.0 tok/s, running 3, waiting 1, KV cache 50.0 %, prefix hits 25.0 %, "
        "preemptions 2"
    )
    later = msgspec.structs.replace(busy, generation_tokens=1005, waiting=0)
    line = lines.line(15.0, later)
    assert line is not None
    assert line.startswith("prompt 0.0 tok/s, generation 1.0 tok/s, running 3, waiting 0, ")
    assert line.endswith("prefix hits -, preemptions 0")


def test_rates_are_not_negative_after_a_restart():
    lines = StatsLog(0.0, Stats(generation_tokens=500, prompt_tokens=90, steps=500))
    line = lines.line(10.0, Stats(running=1, generation_tokens=1, prompt_tokens=1, steps=1))
    assert line is not None
    assert line.startswith("prompt 0.0 tok/s, generation 0.0 tok/s, running 1, ")
    line = lines.line(20.0, Stats(running=1, generation_tokens=21, prompt_tokens=1, steps=21))
    assert line is not None
    assert "generation 2.0 tok/s" in line


def test_idleness_is_told_once():
    lines = StatsLog(0.0, Stats())
    assert lines.line(10.0, Stats()) is None
    done = Stats(generation_tokens=5)
    said = [lines.line(at, done) for at in (20.0, 30.0, 40.0, 50.0)]
    assert said[0] is not None
    assert "generation 0.5 tok/s" in said[0]
    assert said[1] is not None
    assert said[1].startswith("idle")
    assert said[2:] == [None, None]
    again = lines.line(60.0, Stats(running=1, generation_tokens=5))
    assert again is not None
    assert "running 1" in again


def logged(core: Core) -> list[OutputRecord]:
    ended: list[OutputRecord] = []
    core.client.listener = Listener(ended)
    return ended


async def test_a_request_that_ended_tells_its_times_and_counts():
    core = Core(front_end=2)
    ended = logged(core)
    core.client.add_request([[1, 2, 3]], SamplingParams(), origin=ORIGIN)
    handle = core.added[0].handle
    core.clock.advance(0.5)
    core.tokens({handle: [65]}, admitted=(Admitted(handle, 2, 0.25),))
    for _ in range(2):
        core.clock.advance(0.125)
        core.tokens({handle: [65]})
    assert ended == []
    core.clock.advance(0.25)
    core.tokens({handle: [65]}, Finished(handle, FinishReason.LENGTH, preemptions=3))
    assert ended == [
        OutputRecord(
            request="cmpl-7", index=0, model="tiny", client="10.0.0.1:5000", front_end=2, prompt_tokens=3,
            cached_tokens=2, output_tokens=4, finish_reason="length", ttft_s=0.5, itl_s=0.166667, e2e_s=1.0,
            queue_s=0.25, preemptions=3,
        )
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["stop string", "left"])
async def test_a_request_that_ends_here_waits_for_the_core_s_last_word(how: str):
    core = Core()
    ended = logged(core)
    stream = core.client.add_request([[1]], SamplingParams(stop=["EN"]), origin=ORIGIN)
    handle = core.added[0].handle
    core.tokens({handle: text_ids("EN" if how == "stop string" else "E")})
    stream.close()
    assert ended == []
    core.clock.advance(5.0)
    core.tokens({}, Finished(handle, FinishReason.ABORT, preemptions=1))
    [one] = ended
    assert (one.finish_reason, one.preemptions) == ("stop" if how == "stop string" else "abort", 1)
    assert one.e2e_s == 0.0, "it ended before the core knew"


async def test_failures_and_deaths_have_their_cause():
    core = Core()
    ended = logged(core)
    for _ in range(3):
        core.client.add_request([[1]], SamplingParams(), origin=ORIGIN)
    first, second, _ = (request.handle for request in core.added)
    core.tokens({}, Finished(first, FinishReason.ERROR, error="no room"))
    stream = core.client._live[second].stream
    stream.close()
    core.send(Dead("out of luck"))
    assert [(one.finish_reason, one.error) for one in ended] == [
        ("error", "no room"),
        ("error", "out of luck"),
        ("abort", None),
    ]
    assert ended[0].ttft_s is None


async def test_each_output_has_a_line():
    core = Core()
    ended = logged(core)
    core.client.add_request([[1], [2]], SamplingParams(n=2), origin=ORIGIN)
    for request in core.added:
        core.tokens({request.handle: [65]}, Finished(request.handle, FinishReason.LENGTH))
    assert [one.index for one in ended] == [0, 1, 2, 3]
    assert {one.request for one in ended} == {"cmpl-7"}
    assert all(one.itl_s is None for one in ended)


def test_the_line_is_json(caplog: pytest.LogCaptureFixture):
    ended = OutputRecord("a", 0, 'm"', "c", 0, 1, 0, 2, "stop", 0.5, None, 1.0, 0.0)
    with caplog.at_level(logging.INFO, "redline.request"):
        log_request(ended)
    [record] = caplog.records
    assert msgspec.json.decode(record.getMessage(), type=OutputRecord) == ended
