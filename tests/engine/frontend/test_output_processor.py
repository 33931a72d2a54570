"""A failure over one request in a front end is that request's: its neighbors get all that is theirs."""

import asyncio
from typing import Any

import pytest

from engine.api.error_responses import ApiError
from engine.errors import EngineDeadError, NotServedError, RedlineError, RequestError
from engine.frontend.detokenizer import Detokenizer
from engine.frontend.listener import OutputRecord
from engine.frontend.prompts import Text
from engine.frontend.sampling_params import MAX_STOP_TOKEN_IDS, SamplingParams
from engine.frontend.streams import RequestOptions, collect_outputs
from engine.frontend.tokenizer import Tokenizer
from engine.messages import Finished, FinishReason
from tests.engine.frontend.test_core_client import READY, Core, Listener, read, text_ids
from tests.engine.frontend.text_core import TextCore

BAD = 250  # the token that no text can be made of


class PanicError(BaseException):
    """As a library in Rust raises it: no Exception."""


@pytest.fixture(params=[KeyError("no piece"), PanicError("index out of range")], ids=["error", "panic"])
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Detokenizers that fail over BAD, or at the end of a text that had BAD + 1."""
    push, finish = Detokenizer.push, Detokenizer.finish
    marked: set[int] = set()

    def bad_push(self: Detokenizer, token: int) -> tuple[str, str | None]:
        if token == BAD:
            raise request.param
        if token == BAD + 1:
            marked.add(id(self))
        return push(self, token)

    def bad_finish(self: Detokenizer) -> str:
        if id(self) in marked:
            raise request.param
        return finish(self)

    monkeypatch.setattr(Detokenizer, "push", bad_push)
    monkeypatch.setattr(Detokenizer, "finish", bad_finish)


@pytest.mark.usefixtures("broken")
async def test_a_detokenizer_that_fails_ends_its_request_alone():
    core = Core()
    ended: list[Any] = []
    core.client.listener = Listener(ended)
    streams = [core.client.add_request([text_ids("a")], SamplingParams()) for _ in range(3)]
    first, bad, last = (request.handle for request in core.added)
    core.tokens({first: text_ids("x"), bad: [BAD], last: text_ids("y")})
    core.tokens({first: text_ids("X"), bad: [7], last: text_ids("Y")}, Finished(last, FinishReason.LENGTH))
    assert core.aborted == [bad], "the core gives its row and its blocks to others"
    core.tokens({first: text_ids("!")}, Finished(first, FinishReason.LENGTH), Finished(bad, FinishReason.ABORT))
    assert [(await collect_outputs(stream))[0].text for stream in (streams[0], streams[2])] == ["xX!", "yY"]
    with pytest.raises(RedlineError, match="could not produce this request's text: "):
        await read(streams[1])
    assert core.client.total_stats.live == 0
    assert not core.client._unreported
    assert sorted(one.finish_reason for one in ended) == ["error", "length", "length"]
    assert core.client.stats.live == 0


@pytest.mark.usefixtures("broken")
async def test_a_detokenizer_that_fails_with_the_last_token_or_after_it():
    core = Core()
    streams = [core.client.add_request([text_ids("a")], SamplingParams()) for _ in range(3)]
    first, second, last = (request.handle for request in core.added)
    ends = [Finished(handle, FinishReason.LENGTH) for handle in (first, second, last)]
    core.tokens({first: [BAD], second: [BAD + 1], last: text_ids("y")}, *ends)
    for stream in streams[:2]:
        with pytest.raises(RedlineError, match="could not produce"):
            await collect_outputs(stream)
    assert (await collect_outputs(streams[2]))[0].text == "y"
    assert core.client.total_stats.live == 0
    assert core.aborted == [], "the core has ended them by itself"


@pytest.mark.usefixtures("broken")
async def test_the_other_outputs_of_the_request_end_too():
    core = Core()
    stream = core.client.add_request([text_ids("a")], SamplingParams(n=3, temperature=1.0))
    handles = [request.handle for request in core.added]
    core.tokens({handles[1]: [BAD]})
    assert sorted(core.aborted) == handles
    with pytest.raises(RedlineError, match="could not produce"):
        await collect_outputs(stream)
    assert core.client.total_stats.live == 0


async def test_a_reader_that_fails_and_a_log_that_fails_harm_nobody():
    core = Core()

    class FullDisk(Listener):
        def output_recorded(self, record: OutputRecord) -> None:
            raise OSError("disk full")

    core.client.listener = FullDisk()
    streams = [core.client.add_request([text_ids("a")], SamplingParams()) for _ in range(2)]
    first, last = (request.handle for request in core.added)
    core.tokens(
        {first: text_ids("x"), last: text_ids("y")},
        *(Finished(handle, FinishReason.LENGTH) for handle in (first, last)),
    )
    assert [(await collect_outputs(stream))[0].text for stream in streams] == ["x", "y"]
    core.client.close()


async def test_a_message_that_can_not_be_read_fails_who_may_be_concerned_and_no_later_ones():
    core = Core()
    stream = core.client.add_request([text_ids("a")], SamplingParams(n=2, temperature=1.0))
    handles = [request.handle for request in core.added]
    call = asyncio.ensure_future(core.client.call_utility("adapters"))
    await asyncio.sleep(0)
    core.client.deliver(b"\xc1 not msgpack")
    for waiting in (read(stream), call):
        with pytest.raises(RedlineError, match="a message of the EngineCore could not be read"):
            await waiting
    assert sorted(core.aborted) == handles
    assert core.client.total_stats.live == 0
    assert core.client._calls == {}
    later = core.client.add_request([text_ids("a")], SamplingParams())
    core.tokens({core.added[-1].handle: text_ids("b")}, Finished(core.added[-1].handle, FinishReason.LENGTH))
    assert (await collect_outputs(later))[0].text == "b"


async def test_what_the_engine_failed_over_is_no_fault_of_the_request():
    core = Core()
    refused, failed, gone = (core.client.add_request([text_ids("a")], SamplingParams()) for _ in range(3))
    one, other, last = (request.handle for request in core.added)
    core.tokens({}, Finished(one, FinishReason.ERROR, error="no"), Finished(other, FinishReason.FAILED, error="oh"))
    core.tokens({}, Finished(last, FinishReason.NOT_SERVED, error="no adapter"))
    with pytest.raises(NotServedError, match="no adapter") as unserved:
        await read(gone)
    answer = ApiError.from_exception(unserved.value)
    assert (answer.status, answer.param, answer.code) == (404, "model", "model_not_found")
    with pytest.raises(RequestError, match="no"):
        await read(refused)
    with pytest.raises(RedlineError, match="oh") as caught:
        await read(failed)
    assert not isinstance(caught.value, RequestError)


async def test_a_request_that_came_too_late_for_a_shutdown_may_go_elsewhere():
    core = Core()
    late = core.client.add_request([text_ids("a")], SamplingParams())
    core.tokens({}, Finished(core.added[-1].handle, FinishReason.SHUT_DOWN, error="the server is shutting down"))
    with pytest.raises(EngineDeadError, match="shutting down") as caught:
        await read(late)
    assert ApiError.from_exception(caught.value).status == 503


# --------------------------------------------------------------------------------------------- what can't be sent


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"priority": 10**23}, "priority", "64-bit"),
        ({"priority": -(10**23)}, "priority", "64-bit"),
        ({"cache_salt": "\ud800"}, "cache_salt", "lone surrogate"),
        ({"adapter": "\udc00"}, "adapter", "lone surrogate"),
    ],
)
async def test_what_can_not_be_sent_is_refused_and_leaves_nothing(fields: dict[str, Any], param: str, said: str):
    core = Core()
    core.client.ready = type(READY)(**{**{n: getattr(READY, n) for n in READY.__struct_fields__},
                                       "scheduling_policy": "priority"})  # fmt: skip
    with pytest.raises(RequestError, match=said) as caught:
        core.client.add_request([[1]], SamplingParams(n=2, temperature=1.0), RequestOptions(**fields))
    assert caught.value.field == param
    assert core.client.total_stats.live == core.client.stats.live == 0
    assert core.received == []


@pytest.mark.parametrize("after", [0, 2])
async def test_an_error_while_sending_takes_back_what_was_sent(after: int, monkeypatch: pytest.MonkeyPatch):
    core = Core()
    send, count = core.transport.send, 0

    def full(message: Any) -> None:
        nonlocal count
        count += 1
        if count == after + 1:
            raise OverflowError("can't serialize ints")
        send(message)

    monkeypatch.setattr(core.transport, "send", full)
    with pytest.raises(RequestError, match="a value that can't be sent to the engine: can't serialize"):
        core.client.add_request([[1], [2]], SamplingParams(n=2, temperature=1.0))
    assert core.client.total_stats.live == core.client.stats.live == 0
    assert len(core.added) == after
    assert core.aborted == [one.handle for one in core.added]


async def test_a_call_with_an_argument_that_can_not_be_sent_leaves_nothing():
    core = Core()
    with pytest.raises(RequestError, match="load_adapter: an argument can't be sent"):
        await core.client.call_utility("load_adapter", name="a", path=object())
    assert core.client._calls == {}


def test_stop_token_ids_have_an_end():
    assert SamplingParams(stop_token_ids=[1] * MAX_STOP_TOKEN_IDS).stop_token_ids is not None
    with pytest.raises(RequestError, match=f"at most {MAX_STOP_TOKEN_IDS} ids, not {MAX_STOP_TOKEN_IDS + 1}") as caught:
        SamplingParams(stop_token_ids=list(range(MAX_STOP_TOKEN_IDS + 1)))
    assert caught.value.field == "stop_token_ids"
    with pytest.raises(RequestError, match="at most 1024 tokens, not 1025") as caught:
        SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0))
    assert caught.value.field == "logit_bias"


@pytest.mark.parametrize("name", ["n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"])
def test_numbers_that_must_be_whole(name: str):
    with pytest.raises(RequestError, match=f"{name} must be an integer, not 1.5") as caught:
        SamplingParams(**{name: 1.5})
    assert caught.value.field == name


# ------------------------------------------------------------------------------------------------------- inline


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("at_the_end", [False, True])
def test_inline_a_detokenizer_that_fails_ends_its_request_alone(stand_in: Tokenizer, at_the_end: bool):
    core = TextCore(stand_in, inline=True)
    streams = [core.client.add_request([Text("a")], SamplingParams()) for _ in range(2)]
    bad, good = (request.handle for request in core.added)
    ends = [Finished(handle, FinishReason.LENGTH) for handle in (bad, good)]
    if at_the_end:
        core.step({bad: [BAD + 1], good: text_ids("y")}, ends)
        assert core.stopped == []
    else:
        core.step({bad: [BAD], good: text_ids("y")})
        assert core.stopped == [bad], "the core is to give its row to others"
        core.step({good: text_ids("z")}, ends[1:])
    with pytest.raises(RedlineError, match="could not produce this request's text"):
        asyncio.run(collect_outputs(streams[0]))
    assert asyncio.run(collect_outputs(streams[1]))[0].text == ("y" if at_the_end else "yz")
    assert len(core.texts._live) == core.client.total_stats.live == 0
