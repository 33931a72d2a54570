"""The front end within the core's loop gives what the one of its own process gives."""

import itertools
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.columns import column, int32s, int64s
from engine.errors import RequestError
from engine.frontend.inline_front_end import InlineTexts
from engine.frontend.prompts import Text
from engine.frontend.sampling_params import SamplingParams
from engine.frontend.streams import Delta, RequestStream
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.tokenizer_backends import FastBackend
from engine.logprob_columns import TokenLogprobs
from engine.messages import Abort, AddRequest, Admitted, Finished, FinishReason, Outputs, Sampling, TextOptions
from tests.engine.frontend.conftest import byte_level_library, sentence_piece_library
from tests.engine.frontend.text_core import TextCore

BYTE_LEVEL = Tokenizer(FastBackend(byte_level_library()), eos_ids=[0])
SENTENCE_PIECE = Tokenizer(FastBackend(sentence_piece_library()), eos_ids=[2])
LIMIT = 64


def drain(stream: RequestStream) -> list[Delta]:
    """What a reader would get now."""
    deltas = [output.delta for output in stream._ready if output.delta is not None]
    for output in stream._ready:
        output.delta = None
    stream._ready.clear()
    return deltas


steps = st.lists(st.integers(1, 3), max_size=12)


@settings(max_examples=200)
@given(
    st.sampled_from([BYTE_LEVEL, SENTENCE_PIECE]),
    st.text(alphabet="ab é😀", min_size=1, max_size=12),
    st.lists(st.integers(0, 262), min_size=1, max_size=20),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=2),
    st.booleans(),
    st.booleans(),
    st.sampled_from([FinishReason.LENGTH, FinishReason.STOP, FinishReason.ABORT]),
    steps,
)
@example(BYTE_LEVEL, "a", BYTE_LEVEL.encode("ab"), ["b"], False, False, FinishReason.LENGTH, [2])  # both at once
def test_every_reader_gets_the_same_as_from_v1(
    tokenizer: Tokenizer,
    prompt: str,
    tokens: list[int],
    stops: list[str],
    include: bool,
    skip: bool,
    reason: FinishReason,
    sizes: list[int],
):
    params = SamplingParams(stop=stops, include_stop_str_in_output=include, skip_special_tokens=skip, max_tokens=50)
    plain, inline = TextCore(tokenizer), TextCore(tokenizer, inline=True)
    ours = plain.client.add_request([tokenizer.encode(prompt)], params)
    theirs = inline.client.add_request([Text(prompt)], params)
    assert inline.added[0].prompt == b"", "the front end doesn't tokenise"
    assert int32s(inline.read[0].prompt).tolist() == tokenizer.encode(prompt)
    plan = itertools.chain(sizes, itertools.repeat(1))
    got: list[tuple[list[Delta], list[Delta]]] = []
    while tokens:
        size = next(plan)
        now, tokens = tokens[:size], tokens[size:]
        stop_id = now[-1] if reason is FinishReason.STOP else -1
        for core in (plain, inline):
            handle = core.added[0].handle
            core.step({handle: now}, () if tokens else (Finished(handle, reason, stop_id),))
        got.append((drain(ours), drain(theirs)))
    for expected, found in got:
        assert found == expected
    assert plain.client.total_stats.live == inline.client.total_stats.live == 0
    assert len(inline.texts._live) == 0
    assert theirs.prompt_tokens == len(tokenizer.encode(prompt))
    aborted = [[message for message in core.received if isinstance(message, Abort)] for core in (plain, inline)]
    assert len(aborted[0]) == len(inline.stopped), "who ends a request at a stop string"
    assert aborted[1] == [], "not the front end"


def reader(tokenizer: Tokenizer = BYTE_LEVEL) -> InlineTexts:
    return InlineTexts(tokenizer, LIMIT, tokenizer.vocab_size)


def request(text: str, handle: int = 1, **fields: Any) -> AddRequest:
    settings = {
        "max_tokens": LIMIT,
        "sampling": Sampling(),
        "text": text,
        "text_options": TextOptions(("END",)),
        **fields,
    }
    return AddRequest(handle, b"", **settings)


def outputs(tokens: dict[int, list[int]], *finished: Finished, **fields: Any) -> Outputs:
    return Outputs(
        at=1.0,
        handles=column(list(tokens), "<i8"),
        tokens=column([token for some in tokens.values() for token in some]),
        counts=column([*map(len, tokens.values())]),
        finished=finished,
        **fields,
    )


@pytest.mark.parametrize(("text", "said"), [("", "empty"), ("é" * 100, "64")])
def test_a_text_that_cannot_be_served_is_refused_alone(text: str, said: str):
    texts = reader()
    with pytest.raises(RequestError, match=said) as caught:
        texts.add(request(text))
    assert caught.value.field == "prompt"
    assert len(texts._live) == 0


def test_a_token_the_model_lacks_is_refused():
    texts = InlineTexts(BYTE_LEVEL, LIMIT, 50)
    with pytest.raises(RequestError, match="not in the vocabulary"):
        texts.add(request("the quick"))


def test_limits_are_cut_to_the_room_behind_the_text():
    texts = reader()
    read = texts.add(request("the quick", min_tokens=63, sampling=Sampling(min_tokens=63)))
    room = LIMIT - len(BYTE_LEVEL.encode("the quick"))
    assert (read.max_tokens, read.min_tokens, read.sampling.min_tokens) == (room, room, room)
    assert read.text == "the quick"


def test_special_tokens_are_added_only_where_asked_for():
    texts = InlineTexts(SENTENCE_PIECE, LIMIT, SENTENCE_PIECE.vocab_size)
    for special in (True, False):
        read = texts.add(request("ab", handle=int(special), add_special_tokens=special))
        assert int32s(read.prompt).tolist() == SENTENCE_PIECE.encode("ab", special)


def test_a_prompt_of_ids_is_only_written():
    texts = reader()
    message = AddRequest(1, column([5, 6]), 7, Sampling(), text_options=TextOptions())
    assert texts.add(message) == message
    assert len(texts._live) == 1


def test_a_stop_string_cuts_tokens_and_logprobs_and_leaves_others_alone():
    texts = reader()
    for handle in (1, 2):
        texts.add(request("the", handle=handle))
    end, other = BYTE_LEVEL.encode("okENDxx"), BYTE_LEVEL.encode("fox")
    count = len(end) + len(other)
    logprobs = TokenLogprobs(
        width=1,
        index=column(range(count)),
        ids=column([*end, *other]),
        values=column([0.0] * count, "<f4"),
        ranks=column(range(count)),
    )
    written, stopped = texts.outputs(outputs({1: end, 2: other}, logprobs=logprobs))
    assert stopped == (1,)
    assert written.texts == ("ok", "fox")
    assert int64s(written.handles).tolist() == [1, 2]
    used = int32s(written.counts).tolist()
    kept = [*end[: used[0]], *other]
    assert used == [len(BYTE_LEVEL.encode("okEND")), len(other)]
    assert int32s(written.tokens).tolist() == kept
    assert written.logprobs is not None
    assert int32s(written.logprobs.ids).tolist() == kept
    assert int32s(written.logprobs.index).tolist() == list(range(len(kept)))
    assert written.finished == (Finished(1, FinishReason.STOP, stop="END"),)
    late, stopped = texts.outputs(outputs({1: [5]}, Finished(1, FinishReason.ABORT)))
    assert stopped == ()
    assert late.texts == ("",)


def test_the_end_brings_what_was_held_back():
    texts = reader()
    texts.add(request("the"))
    written, _ = texts.outputs(outputs({1: BYTE_LEVEL.encode("aEN")}, Finished(1, FinishReason.LENGTH, preemptions=2)))
    assert written.texts == ("a",)
    assert written.finished == (Finished(1, FinishReason.LENGTH, preemptions=2, text="EN"),)
    assert len(texts._live) == 0


def test_admission_tells_how_long_the_text_is():
    texts = reader()
    texts.add(request("the quick"))
    written, _ = texts.outputs(Outputs(at=1.0, admitted=(Admitted(1, 2, 0.5), Admitted(9, 0, 0.0))))
    length = len(BYTE_LEVEL.encode("the quick"))
    assert written.admitted == (Admitted(1, 2, 0.5, prompt_tokens=length), Admitted(9, 0, 0.0))
