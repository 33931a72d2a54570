"""Logprobs of tokens that are pieces of characters, or that read alike: each keeps a value of its own."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.api.logprobs import TextOffsets, chat_logprobs, completion_logprobs, token_key
from engine.api.render import Chunks
from engine.frontend.detokenizer import Detokenizer
from engine.frontend.sampling_params import SamplingParams
from engine.frontend.streams import Delta, TokenLogprob
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.tokenizer_backends import FastBackend
from tests.engine.api.conftest import InLoop
from tests.engine.frontend.conftest import END, byte_level_library, sentence_piece_library

BYTE_LEVEL = Tokenizer(FastBackend(byte_level_library()))
SENTENCE_PIECE = Tokenizer(FastBackend(sentence_piece_library()))


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text as one token a byte."""
    own = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    return [own[bytes([byte])] for byte in text.encode()]


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCE_PIECE], ids=["byte-level", "sentencepiece"])
def test_pieces_of_a_character_keep_their_own_values(tokenizer: Tokenizer):
    sampled, second, third = byte_ids(tokenizer, "\U0001f600")[1:]
    entry = TokenLogprob(sampled, -0.059, 1, ((sampled, -0.059), (second, -7.637), (third, -9.25)))
    body = completion_logprobs(tokenizer, [entry], TextOffsets(tokenizer))
    assert body["tokens"] == ["bytes:\\x9f"]
    assert body["token_logprobs"] == [-0.059]
    assert body["top_logprobs"] == [{"bytes:\\x9f": -0.059, "bytes:\\x98": -7.637, "bytes:\\x80": -9.25}]


def test_tokens_that_read_alike_are_told_apart_by_id():
    """The first of them is the sampled one, whose text is the key that clients look for."""
    end = BYTE_LEVEL.backend.id_of(END)
    assert end is not None
    library = byte_level_library()
    library.add_tokens(["\u00e9"])  # an added token with the text of an ordinary one's bytes
    tokenizer = Tokenizer(FastBackend(library))
    nothing = tokenizer.vocab_size + 5  # ids behind the vocabulary have no text
    entry = TokenLogprob(nothing, -5.0, 3, ((end, -0.5), (nothing + 1, -1.0), (nothing + 2, -2.0)))
    [top] = completion_logprobs(tokenizer, [entry], TextOffsets(tokenizer))["top_logprobs"]
    assert top == {"": -5.0, END: -0.5, f"token_id:{nothing + 1}": -1.0, f"token_id:{nothing + 2}": -2.0}


@given(st.data())
def test_the_sampled_token_is_always_there_with_its_value_and_none_is_lost(data: st.DataObject):
    tokenizer = data.draw(st.sampled_from([BYTE_LEVEL, SENTENCE_PIECE]))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), min_size=1, max_size=21, unique=True))
    values = [-float(rank) for rank in range(len(ids))]
    at = data.draw(st.integers(0, len(ids) - 1))
    top = tuple(zip(ids, values, strict=True))
    for alternatives in (top, top[:at]):  # with the sampled token among the alternatives, and without
        entry = TokenLogprob(ids[at], values[at], at + 1, alternatives)
        body = completion_logprobs(tokenizer, [entry], TextOffsets(tokenizer))
        [shown] = body["top_logprobs"]
        assert shown[body["tokens"][0]] == body["token_logprobs"][0] == values[at]
        assert sorted(shown.values()) == sorted({value for _, value in (*alternatives, top[at])})


def test_a_word_keeps_the_space_before_it():
    found = {token_key(SENTENCE_PIECE, token) for token in range(SENTENCE_PIECE.vocab_size)}
    assert {" the", " a", "a", "b", " b", "ab", "</s>", "bytes:\\xe6", "A"} <= found
    word = SENTENCE_PIECE.backend.id_of("\u2581the")
    assert word is not None
    [entry] = chat_logprobs(SENTENCE_PIECE, [TokenLogprob(word, -1.0, 1, ())])["content"]
    assert (entry["token"], entry["bytes"]) == (" the", list(b" the"))
    [piece] = chat_logprobs(SENTENCE_PIECE, [TokenLogprob(byte_ids(SENTENCE_PIECE, "\u65e5")[0], -1.0, 1, ())])[
        "content"
    ]
    assert piece["bytes"] == [0xE6]


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCE_PIECE], ids=["byte-level", "sentencepiece"])
def test_offsets_point_into_the_text(tokenizer: Tokenizer):
    text = "a\u65e5b\U0001f600\u00e9c"
    ids = byte_ids(tokenizer, text)
    offsets = TextOffsets(tokenizer, start=3)
    assert [offsets.next(token) for token in ids] == [3, 4, 4, 4, 5, 6, 6, 6, 6, 7, 7, 8]


def test_offsets_count_what_broken_characters_become():
    first, second, _ = byte_ids(BYTE_LEVEL, "\u65e5")
    [letter] = byte_ids(BYTE_LEVEL, "a")
    end = BYTE_LEVEL.backend.id_of(END)
    assert end is not None
    ids = [first, letter, first, second, first, letter, second, end, letter]
    offsets = TextOffsets(BYTE_LEVEL)
    assert [offsets.next(token) for token in ids] == [0, 1, 2, 2, 3, 4, 5, 6, 6]
    assert BYTE_LEVEL.decode(ids) == "\ufffda\ufffd\ufffda\ufffda"


@given(st.data())
def test_no_offset_lies_behind_the_text_and_none_falls_back(data: st.DataObject):
    tokenizer = data.draw(st.sampled_from([BYTE_LEVEL, SENTENCE_PIECE]))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    skip = data.draw(st.booleans())
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    text = "".join(detokenizer.push(token)[0] for token in ids) + detokenizer.finish()
    offsets = TextOffsets(tokenizer, skip_special=skip)
    places = [offsets.next(token) for token in ids]
    assert places == sorted(places)
    assert not places or places[-1] <= len(text)
    if tokenizer is BYTE_LEVEL:
        for token, place in zip(ids, places, strict=True):
            shown = "" if skip and token in tokenizer.special_ids else token_key(tokenizer, token)
            if not shown.startswith("bytes:"):
                assert text[place:].startswith(shown)


def test_text_that_a_stop_string_cuts_off_has_no_offsets_behind_the_text():
    ids = byte_ids(BYTE_LEVEL, "ab stop")
    entries = [TokenLogprob(token, -1.0, 1, ()) for token in ids]
    body = completion_logprobs(BYTE_LEVEL, entries, TextOffsets(BYTE_LEVEL), len("ab "))
    assert body["text_offset"] == [0, 1, 2, 3, 3, 3, 3]


async def test_a_stream_and_a_whole_answer_have_the_same_offsets(server: InLoop):
    prompt = list(b"ab")
    stream = server.client.add_request([prompt], SamplingParams(max_tokens=9, logprobs=0))
    entries = [TokenLogprob(token, -1.0, 1, ()) for token in byte_ids(server.client.tokenizer, "cd!stop")]
    deltas = [
        Delta(0, text, [entry.token], [entry])
        for text, entry in zip(["", "cd", "!", "", "", "", ""], entries, strict=True)
    ]
    deltas[-1].finish_reason = "stop"
    chunks = Chunks(stream, server.client.tokenizer, {"id": "x"}, chat=False, echo=lambda _: "ab")
    places = []
    for delta in deltas:
        event = json.loads(chunks.render(delta).removeprefix(b"data: "))
        places += event["choices"][0]["logprobs"]["text_offset"]
    assert places == [2, 3, 4, 5, 6, 7, 5], "of what was held back and never shown only the last is known in time"
    stream.close()


def test_tokens_may_be_written_as_their_ids():
    entry = TokenLogprob(65, -0.5, 1, ((65, -0.5), (66, -1.0)))
    body = completion_logprobs(BYTE_LEVEL, [entry], TextOffsets(BYTE_LEVEL), as_token_ids=True)
    assert (body["tokens"], body["top_logprobs"]) == (["token_id:65"], [{"token_id:65": -0.5, "token_id:66": -1.0}])
    [shown] = chat_logprobs(BYTE_LEVEL, [entry], as_token_ids=True)["content"]
    assert [shown["token"], *(one["token"] for one in shown["top_logprobs"])] == [
        "token_id:65",
        "token_id:65",
        "token_id:66",
    ]
