"""CoreClient against a core double that speaks the real messages."""

import asyncio
import math

import pytest

from engine.clock import FakeClock
from engine.columns import column, int32s
from engine.errors import EngineDeadError, RedlineError, RequestError
from engine.frontend.core_client import CoreClient
from engine.frontend.listener import ClientListener, OutputRecord
from engine.frontend.sampling_params import SamplingParams
from engine.frontend.streams import Delta, RequestStream, collect_outputs
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.tokenizer_backends import StandInBackend
from engine.logprob_columns import TokenLogprobs
from engine.messages import (
    Abort,
    AddRequest,
    Admitted,
    Dead,
    Finished,
    FinishReason,
    FromCore,
    Outputs,
    Ready,
    ToCore,
    Utility,
    UtilityResult,
    decode_to_core,
    encode,
    front_end_of,
)
from engine.stats import Stats
from tests.engine.inline_transport import InlineTransport

READY = Ready("here", "fake", "float32", 300, 64, 4, 16, 4, 64, True)


class Core:
    """Keeps what it is sent, and sends what the test says."""

    def __init__(self, front_end: int = 0, seed: int = 0):
        self.received: list[ToCore] = []
        self.transport = InlineTransport(lambda data: self.received.append(decode_to_core(data)))
        self.clock = FakeClock(100.0)
        tokenizer = Tokenizer(StandInBackend(300), eos_ids=[2])
        self.client = CoreClient(READY, tokenizer, self.transport, self.clock, front_end=front_end, seed=seed)
        self.client.open()

    @property
    def added(self) -> list[AddRequest]:
        return [message for message in self.received if isinstance(message, AddRequest)]

    @property
    def aborted(self) -> list[int]:
        return [handle for message in self.received if isinstance(message, Abort) for handle in message.handles]

    def send(self, message: FromCore) -> None:
        self.transport.from_core(0, encode(message))

    def tokens(self, tokens: dict[int, list[int]], *finished: Finished, **fields: object) -> None:
        self.send(
            Outputs(
                at=self.clock.now(),
                handles=column(list(tokens), "<i8"),
                tokens=column([token for some in tokens.values() for token in some]),
                counts=b"" if all(len(some) == 1 for some in tokens.values()) else column([*map(len, tokens.values())]),
                finished=finished,
                **fields,  # type: ignore[arg-type]
            )
        )


class Listener(ClientListener):
    """Keeps what a client reports."""

    def __init__(self, records: list[OutputRecord] | None = None, causes: list[str] | None = None):
        self.records = [] if records is None else records
        self.causes = [] if causes is None else causes

    @property
    def wants_records(self) -> bool:
        return True

    def output_recorded(self, record: OutputRecord) -> None:
        self.records.append(record)

    def core_died(self, cause: str) -> None:
        self.causes.append(cause)


def text_ids(text: str) -> list[int]:
    return list(text.encode())


async def read(stream: RequestStream) -> list[Delta]:
    return await asyncio.wait_for(anext(stream), 1)


async def test_tokens_arrive_as_deltas_until_the_core_ends_the_request():
    core = Core()
    stream = core.client.add_request([text_ids("ab")], SamplingParams(max_tokens=3))
    handle = core.added[0].handle
    core.tokens({handle: [104]})
    assert await read(stream) == [Delta(0, "h", [104])]
    core.tokens({handle: [105]}, Finished(handle, FinishReason.LENGTH))
    assert await read(stream) == [Delta(0, "i", [105], finish_reason="length")]
    with pytest.raises(StopAsyncIteration):
        await read(stream)
    assert core.client.total_stats.live == 0
    assert core.aborted == []


async def test_a_slow_reader_gets_one_merged_delta():
    core = Core()
    stream = core.client.add_request([[1]], SamplingParams())
    handle = core.added[0].handle
    for character in "hello":
        core.tokens({handle: text_ids(character)})
    assert await read(stream) == [Delta(0, "hello", text_ids("hello"))]


async def test_a_reader_that_waits_is_woken():
    core = Core()
    stream = core.client.add_request([[1]], SamplingParams())
    waiting = asyncio.ensure_future(read(stream))
    await asyncio.sleep(0)
    assert not waiting.done()
    core.tokens({core.added[0].handle: [65]})
    assert (await waiting)[0].text == "A"


async def test_several_tokens_a_step_come_in_their_order():
    core = Core()
    stream = core.client.add_request([[1], [2]], SamplingParams())
    first, second = (request.handle for request in core.added)
    core.tokens({first: text_ids("abc"), second: text_ids("x")})
    assert [(delta.index, delta.text) for delta in await read(stream)] == [(0, "abc"), (1, "x")]


async def test_each_prompt_has_n_outputs_with_handles_and_seeds_of_their_own():
    core = Core(front_end=3)
    stream = core.client.add_request([[1], [2, 2]], SamplingParams(n=2, seed=5))
    assert len({request.handle for request in core.added}) == 4
    assert {front_end_of(request.handle) for request in core.added} == {3}
    assert [int32s(request.prompt).tolist() for request in core.added] == [[1], [1], [2, 2], [2, 2]]
    seeds = [request.sampling.seed for request in core.added]
    assert seeds[0] == seeds[2] == 5
    assert seeds[1] == seeds[3] != 5
    for request in core.added:
        core.tokens({request.handle: [65]}, Finished(request.handle, FinishReason.LENGTH))
    assert [output.text for output in await collect_outputs(stream)] == ["A"] * 4


async def test_seeds_are_drawn_from_the_engine_s():
    def seeds(engine_seed: int) -> list[int]:
        core = Core(seed=engine_seed)
        for _ in range(3):
            core.client.add_request([[1]], SamplingParams())
        return [request.sampling.seed for request in core.added]

    assert seeds(1) == seeds(1)
    assert len({*seeds(1), *seeds(2)}) == 6


async def test_a_stop_string_ends_the_output_here_and_in_the_core():
    core = Core()
    stream = core.client.add_request([[1]], SamplingParams(stop=["EN"], max_tokens=20))
    handle = core.added[0].handle
    core.tokens({handle: text_ids("okE")})
    assert (await read(stream))[0].text == "ok"
    core.tokens({handle: text_ids("NDxx")})
    [delta] = await read(stream)
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("", "stop", "EN")
    assert delta.token_ids == text_ids("N"), "tokens behind the stop string don't count"
    assert core.aborted == [handle]
    core.tokens({handle: [65]}, Finished(handle, FinishReason.ABORT))
    with pytest.raises(StopAsyncIteration):
        await read(stream)


@pytest.mark.parametrize(("include", "text"), [(False, "A"), (True, "A<200>")])
async def test_a_stop_id_is_a_token_but_no_text(include: bool, text: str):
    core = Core()
    params = SamplingParams(stop_token_ids=[200], include_stop_str_in_output=include)
    stream = core.client.add_request([[1]], params)
    handle = core.added[0].handle
    core.tokens({handle: [65, 200]}, Finished(handle, FinishReason.STOP, stop_id=200))
    [delta] = await read(stream)
    assert (delta.text, delta.token_ids) == (text, [65, 200])
    assert (delta.finish_reason, delta.stop_reason) == ("stop", 200)


async def test_the_model_s_own_end_is_no_reason_to_name():
    core = Core()
    stream = core.client.add_request([[1]], SamplingParams())
    handle = core.added[0].handle
    core.tokens({handle: [2]}, Finished(handle, FinishReason.STOP, stop_id=2))
    assert await read(stream) == [Delta(0, "", [2], finish_reason="stop")]


async def test_held_back_text_comes_with_the_end():
    core = Core()
    stream = core.client.add_request([[1]], SamplingParams(stop="END"))
    handle = core.added[0].handle
    core.tokens({handle: text_ids("EN")}, Finished(handle, FinishReason.LENGTH))
    assert (await read(stream))[0].text == "EN"


async def test_logprobs_go_to_those_who_asked():
    core = Core()
    plain = core.client.add_request([[1]], SamplingParams())
    asking = core.client.add_request([[1]], SamplingParams(logprobs=1))
    handles = [request.handle for request in core.added]
    columns = TokenLogprobs(
        width=3,
        index=column([1]),
        ids=column([[66, 66, 67]]),
        values=column([[-0.5, -0.5, -1.5]], "<f4"),
        ranks=column([1]),
    )
    core.tokens({handles[0]: [65], handles[1]: [66]}, logprobs=columns)
    assert (await read(plain))[0].logprobs is None
    entries = (await read(asking))[0].logprobs
    assert entries is not None
    assert (entries[0].token, entries[0].rank, entries[0].top) == (66, 1, ((66, -0.5),))
    assert math.isclose(entries[0].logprob, -0.5)


async def test_closing_a_stream_aborts_what_still_runs():
    core = Core()
    async with core.client.add_request([[1], [2]], SamplingParams()) as stream:
        done, open_one = (request.handle for request in core.added)
        core.tokens({done: [65]}, Finished(done, FinishReason.LENGTH))
        await read(stream)
    assert core.aborted == [open_one]
    assert core.client.total_stats.live == 0
    assert core.client.stats.finished == {"length": 1, "abort": 1}


async def test_closing_wakes_a_reader():
    core = Core()
    stream = core.client.add_request([[1]], SamplingParams())
    waiting = asyncio.ensure_future(collect_outputs(stream))
    await asyncio.sleep(0)
    stream.close()
    assert (await asyncio.wait_for(waiting, 1))[0].finish_reason is None


async def test_a_refusal_of_the_core_is_the_request_s_error_and_ends_its_other_outputs():
    core = Core()
    stream = core.client.add_request([[1], [2]], SamplingParams())
    first, second = (request.handle for request in core.added)
    core.tokens({}, Finished(first, FinishReason.ERROR, error="no room"))
    with pytest.raises(RequestError, match="no room"):
        await read(stream)
    assert core.aborted == [second]


@pytest.mark.parametrize(
    ("prompt", "said"), [([], "empty"), ([1] * 64, "64"), ([300], "300"), ([-1], "-1"), ([5, 2**40], str(2**40))]
)
async def test_prompts_that_cannot_be_served_are_refused_at_once(prompt: list[int], said: str):
    core = Core()
    with pytest.raises(RequestError, match=said) as caught:
        core.client.add_request([[1], prompt], SamplingParams())
    assert caught.value.field == "prompt"
    assert core.received == [], "the good prompt must not run alone"


@pytest.mark.parametrize("how", ["message", "process"])
async def test_the_death_of_the_core_reaches_everybody_once(how: str):
    core = Core()
    causes: list[str] = []
    core.client.listener = Listener(causes=causes)
    stream = core.client.add_request([[1]], SamplingParams())
    call = asyncio.ensure_future(core.client.call_utility("reset_prefix_cache"))
    await asyncio.sleep(0)
    if how == "message":
        core.send(Dead("out of luck"))
    else:
        core.client.core_lost_threadsafe(0, "out of luck")
        await asyncio.sleep(0)
    core.client.fail_all("the process ended, too")
    for waiting in (read(stream), call):
        with pytest.raises(EngineDeadError, match="out of luck"):
            await waiting
    with pytest.raises(EngineDeadError, match="out of luck"):
        core.client.add_request([[1]], SamplingParams())
    assert causes == ["out of luck"]


async def test_utilities_are_answered_or_fail_with_their_own_words():
    core = Core()
    calls = [asyncio.ensure_future(core.client.call_utility("reset_prefix_cache")) for _ in range(2)]
    await asyncio.sleep(0)
    sent = [message for message in core.received if isinstance(message, Utility)]
    assert [message.method for message in sent] == ["reset_prefix_cache"] * 2
    core.send(UtilityResult(sent[1].call, error="not now"))
    core.send(UtilityResult(sent[0].call, 7))
    assert await calls[0] == 7
    with pytest.raises(RedlineError, match="not now"):
        await calls[1]


async def test_times_and_counts_for_the_metrics():
    core = Core()
    stream = core.client.add_request([[1, 2, 3]], SamplingParams())
    handle = core.added[0].handle
    core.clock.advance(0.5)
    stats = Stats(running=1, prompt_tokens=3, generation_tokens=1, steps=1)
    core.tokens({handle: [65]}, admitted=(Admitted(handle, 2, 0.25),), stats=stats)
    for _ in range(2):
        core.clock.advance(0.125)
        core.tokens({handle: [65]})
    core.clock.advance(0.25)
    core.tokens({handle: [65]}, Finished(handle, FinishReason.LENGTH))
    kept = core.client.stats
    assert stream.cached_tokens == [2]
    assert kept.core.running == 1
    assert (kept.ttft.total, sum(kept.ttft.counts)) == (0.5, 1)
    assert (kept.itl.total, sum(kept.itl.counts)) == (0.5, 3)
    assert kept.queue.total == 0.25
    assert kept.e2e.total == 1.0
    assert (kept.prompt_tokens.total, kept.generation_tokens.total) == (3, 4)
    assert kept.step_tokens.total == 4
