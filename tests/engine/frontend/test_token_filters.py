"""Bad words as token ids, each form that counts, and what bars everything."""

import pytest

from engine.columns import int32s
from engine.errors import RequestError
from engine.frontend.sampling_params import SamplingParams, make_request
from engine.frontend.token_filters import bad_word_ids
from engine.frontend.tokenizer import Tokenizer


def test_a_word_is_barred_as_it_begins_a_text_and_behind_a_space(byte_level: Tokenizer):
    bare, spaced = byte_level.encode("the", False), byte_level.encode(" the", False)
    found = bad_word_ids(["the", " the"], byte_level, 400)
    assert found == tuple(dict.fromkeys(tuple(form) for form in (bare, spaced) if len(form) == len(bare)))
    assert bare != spaced
    assert [byte_level.decode(list(form)).strip() for form in found] == ["the"] * len(found)


def test_a_word_that_takes_a_space_as_a_token_of_its_own_has_one_form(stand_in: Tokenizer):
    assert bad_word_ids(["ab", "c"], stand_in, 300) == ((97, 98), (99,))


def test_a_tokenizer_that_writes_the_space_itself_has_one_form(sentence_piece: Tokenizer):
    [form] = bad_word_ids(["the"], sentence_piece, 300)
    assert list(form) == sentence_piece.encode("the", False)


def test_a_word_beyond_the_vocabulary_is_refused(stand_in: Tokenizer):
    with pytest.raises(RequestError, match="no tokens for 'ab'") as caught:
        bad_word_ids(["ab"], stand_in, 98)
    assert caught.value.field == "bad_words"


def test_a_request_carries_what_is_barred(stand_in: Tokenizer):
    params = SamplingParams(allowed_token_ids=[5, 7], bad_words=["ab"], prompt_logprobs=3)
    request = make_request(1, [4], params, stand_in, 0, 20, bad_words=((97, 98),))
    assert int32s(request.sampling.allowed).tolist() == [5, 7]
    assert request.sampling.bad_words == ((97, 98),)
    assert request.sampling.prompt_logprobs == 3
    assert request.sampling.needs_logits
    assert not make_request(1, [4], SamplingParams(), stand_in, 0, 20).sampling.needs_logits


@pytest.mark.parametrize(
    ("fields", "bad"),
    [
        ({"allowed_token_ids": [2], "min_tokens": 1}, ()),  # 2 ends a text
        ({"allowed_token_ids": [5], "min_tokens": 1, "stop_token_ids": [5]}, ()),
        ({"allowed_token_ids": [5, 6]}, ((5,), (6,))),
    ],
)
def test_a_request_that_leaves_no_token_is_refused(fields: dict, bad: tuple, stand_in: Tokenizer):
    with pytest.raises(RequestError, match="allowed_token_ids has only tokens"):
        make_request(1, [4], SamplingParams(**fields), stand_in, 0, 20, bad_words=bad)
    make_request(1, [4], SamplingParams(**{**fields, "allowed_token_ids": [5, 9]}), stand_in, 0, 20, bad_words=bad[:1])
