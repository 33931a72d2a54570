"""Any text, cut into tokens anywhere, with any stop strings: the events say the text up to the first of those."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.api.render import Chunks
from engine.frontend.sampling_params import SamplingParams
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.tokenizer_backends import FastBackend, byte_characters
from engine.messages import Finished, FinishReason
from tests.engine.frontend.conftest import byte_level_library
from tests.engine.frontend.test_detokenizer import first_stop
from tests.engine.frontend.test_inline_front_end import drain
from tests.engine.frontend.text_core import TextCore

TOKENIZER = Tokenizer(FastBackend(byte_level_library()))
HEAD = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m"}
TOKEN_OF_BYTE = [TOKENIZER.backend.id_of(character) for character in byte_characters()]
BY_BYTES = {
    TOKENIZER.piece(token): token
    for token in range(TOKENIZER.vocab_size)
    if token not in TOKENIZER.special_ids and TOKENIZER.piece(token)
}
LONGEST = max(map(len, BY_BYTES))


@st.composite
def tokens_of(draw: st.DrawFn, text: str) -> list[int]:
    """Some split of the text's bytes into tokens, mostly not the tokenizer's own."""
    data, tokens, begin = text.encode(), [], 0
    while begin < len(data):
        lengths = [n for n in range(1, LONGEST + 1) if data[begin : begin + n] in BY_BYTES and begin + n <= len(data)]
        length = draw(st.sampled_from(lengths))
        tokens.append(BY_BYTES[data[begin : begin + length]])
        begin += length
    return tokens


texts = st.text(max_size=25) | st.text(alphabet="ab é😀👩‍日", max_size=25) | st.just("the quick\ufffd lazy 日本語")
stop_strings = st.lists(
    st.text(min_size=1, max_size=4) | st.text(alphabet="ab é😀", min_size=1, max_size=3), max_size=3
)


def test_each_byte_is_a_token():
    assert None not in TOKEN_OF_BYTE
    assert all(TOKENIZER.piece(token) == bytes([byte]) for byte, token in enumerate(TOKEN_OF_BYTE))


@settings(max_examples=300)
@given(st.data(), texts, stop_strings, st.booleans(), st.booleans(), st.lists(st.booleans(), max_size=60))
def test_the_stream_is_the_text_up_to_the_first_stop_string(
    data: st.DataObject, text: str, stops: list[str], include: bool, inline: bool, reads: list[bool]
):
    if data.draw(st.booleans()) and text:  # some stop strings that are there
        begin = data.draw(st.integers(0, len(text) - 1))
        stops = [*stops, text[begin : begin + data.draw(st.integers(1, 4))]]
    tokens = data.draw(tokens_of(text)) or [BY_BYTES[b"a"]]
    text = text or "a"
    core = TextCore(TOKENIZER, inline=inline)
    stream = core.client.add_request(
        [[1]], SamplingParams(stop=stops, include_stop_str_in_output=include, max_tokens=200)
    )
    chunks = Chunks(stream, TOKENIZER, HEAD, chat=False)
    handle = core.added[0].handle
    events: list[dict] = []

    def read() -> None:
        for delta in drain(stream):
            event = chunks.render(delta)
            assert event.startswith(b"data: ")
            assert event.endswith(b"\n\n")
            events.append(json.loads(event[6:])["choices"][0])

    for number, token in enumerate(tokens):
        last = number == len(tokens) - 1
        core.step({handle: [token]}, (Finished(handle, FinishReason.LENGTH),) if last else ())
        if number >= len(reads) or reads[number]:  # else the reader is slow
            read()
    read()
    assert core.client.total_stats.live == 0
    shown = "".join(event["text"] for event in events)
    found = first_stop(text, stops)
    if found is None:
        assert shown == text
        assert (events[-1]["finish_reason"], events[-1]["stop_reason"]) == ("length", None)
    else:
        assert shown == (text[: found[1]] if include else text[: found[0]])
        assert (events[-1]["finish_reason"], events[-1]["stop_reason"]) == ("stop", text[found[0] : found[1]])
    if "\ufffd" not in text:
        assert not any("\ufffd" in event["text"] for event in events)
    assert [event["finish_reason"] is None for event in events] == [True] * (len(events) - 1) + [False]


@pytest.mark.parametrize("inline", [False, True])
def test_bytes_that_are_no_text_read_as_the_library_reads_them(inline: bool):
    tokens = [TOKEN_OF_BYTE[byte] for byte in b"a\xff\xe3\x81b\xf0\x9f"]
    core = TextCore(TOKENIZER, inline=inline)
    stream = core.client.add_request([[1]], SamplingParams(max_tokens=200))
    handle = core.added[0].handle
    for token in tokens:
        core.step({handle: [token]})
    core.step({}, (Finished(handle, FinishReason.LENGTH),))
    assert "".join(delta.text for delta in drain(stream)) == TOKENIZER.decode(tokens)
