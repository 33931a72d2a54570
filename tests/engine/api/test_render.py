import json

from hypothesis import given
from hypothesis import strategies as st

from engine.api.logprobs import TextOffsets, chat_logprobs, completion_logprobs
from engine.api.render import DONE, ChunkOptions, Chunks
from engine.clock import FakeClock
from engine.frontend.core_client import CoreClient
from engine.frontend.sampling_params import SamplingParams
from engine.frontend.streams import Delta, RequestStream, TokenLogprob
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.tokenizer_backends import StandInBackend
from engine.messages import Ready
from tests.engine.inline_transport import InlineTransport

TOKENIZER = Tokenizer(StandInBackend(300))
HEAD = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": 'a "model"'}


def make_stream() -> RequestStream:
    ready = Ready("here", "fake", "float32", 300, 64, 4, 16, 4, 64, True)
    client = CoreClient(ready, TOKENIZER, InlineTransport(lambda _: None), FakeClock())
    return client.add_request([[1, 2]], SamplingParams(n=2))


def event(data: bytes) -> dict:
    assert data.startswith(b"data: ")
    assert data.endswith(b"\n\n")
    assert data.count(b"\n") == 2
    return json.loads(data[6:])


@given(st.text(), st.integers(0, 3), st.booleans(), st.booleans())
def test_every_text_survives_as_one_event(text: str, index: int, chat: bool, include_usage: bool):
    chunks = Chunks(make_stream(), TOKENIZER, HEAD, chat=chat, options=ChunkOptions(include_usage=include_usage))
    for _ in range(2):  # the first chunk of an output and a later one
        chunk = event(chunks.render(Delta(index, text, [1])))
        assert {name: chunk[name] for name in HEAD} == HEAD
        [choice] = chunk["choices"]
        assert choice["index"] == index
        assert (choice["delta"]["content"] if chat else choice["text"]) == text
        assert choice["finish_reason"] is None
        assert ("usage" in chunk) == include_usage
    last = event(chunks.render(Delta(index, text, [1], finish_reason="stop", stop_reason="x")))
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["choices"][0]["stop_reason"] == "x"
    assert chunks.end().endswith(DONE)
    assert (chunks.end() != DONE) == include_usage


def test_the_last_event_sums_up():
    chunks = Chunks(make_stream(), TOKENIZER, HEAD, chat=False, options=ChunkOptions(include_usage=True))
    chunks.render(Delta(0, "abc", [1, 2, 3]))
    chunks.render(Delta(1, "", [4]))
    usage = event(chunks.end().removesuffix(DONE))["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (2, 4, 6)


def test_logprobs_of_completions_have_offsets_that_run_on():
    entries = [TokenLogprob(65, -0.5, 1, ((65, -0.5), (200, -2.0))), TokenLogprob(201, float("-inf"), 9, ())]
    offsets = TextOffsets(TOKENIZER, start=10)
    body = completion_logprobs(TOKENIZER, entries, offsets)
    assert body["tokens"] == ["A", "<201>"]
    assert body["text_offset"] == [10, 11]
    assert offsets.next(65) == 16
    assert body["top_logprobs"] == [{"A": -0.5, "<200>": -2.0}, {"<201>": -9999.0}]
    assert body["token_logprobs"] == [-0.5, -9999.0]


def test_streamed_logprobs_continue_their_offsets():
    chunks = Chunks(make_stream(), TOKENIZER, HEAD, chat=False)
    entry = TokenLogprob(200, -1.0, 1, ())
    offsets = [
        event(chunks.render(Delta(0, "x", [200], [entry])))["choices"][0]["logprobs"]["text_offset"] for _ in range(3)
    ]
    assert offsets == [[0], [5], [10]]


def test_logprobs_of_chats_have_bytes():
    [entry] = chat_logprobs(TOKENIZER, [TokenLogprob(65, -0.5, 1, ((66, -1.0),))])["content"]
    assert (entry["token"], entry["bytes"], entry["logprob"]) == ("A", [65], -0.5)
    assert entry["top_logprobs"] == [{"token": "B", "logprob": -1.0, "bytes": [66]}]
