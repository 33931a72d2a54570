"""Pairs of texts as the tokenizer writes them, whole or truncated."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import RequestError
from engine.frontend.text_pairs import PairLimits, encode_pair, make_pairs, pair_frame
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.tokenizer_backends import StandInBackend
from tests.engine.frontend.pair_tokenizer import CLS, SEP, make_backend, words

TEMPLATES = ("[CLS] $A [SEP] $B:1 [SEP]:1", "[CLS] $A [SEP] [SEP] $B [SEP]", "$A $B", "[CLS] $A $B:1")
TEXTS = st.lists(st.sampled_from("abcz"), min_size=1, max_size=9).map(" ".join)


@given(template=st.sampled_from(TEMPLATES), first=TEXTS, second=TEXTS)
def test_whole_pairs_are_those_of_the_tokenizer(template: str, first: str, second: str) -> None:
    backend = make_backend(template)
    tokenizer = Tokenizer(backend)
    ids, types = backend.encode_pair(first, second)
    pair = encode_pair(tokenizer, pair_frame(tokenizer), first, second, PairLimits())
    assert pair.ids == ids
    assert pair.second_segment == (types.index(1) if 1 in types else 0)


@given(template=st.sampled_from(TEMPLATES), first=TEXTS, second=TEXTS, keep=st.integers(1, 25))
def test_truncation_cuts_the_end_of_the_second_text(template: str, first: str, second: str, keep: int) -> None:
    tokenizer = Tokenizer(make_backend(template))
    frame = pair_frame(tokenizer)
    whole = encode_pair(tokenizer, frame, first, second, PairLimits())
    room = keep - (len(whole.ids) - len(words(second)))
    if room < 1:
        with pytest.raises(RequestError, match="nothing of the second one is left"):
            encode_pair(tokenizer, frame, first, second, PairLimits(keep))
        return
    shorter = " ".join(second.split()[:room])
    assert encode_pair(tokenizer, frame, first, second, PairLimits(keep)) == encode_pair(
        tokenizer, frame, first, shorter, PairLimits()
    )


def test_the_frame_of_a_pair() -> None:
    assert pair_frame(Tokenizer(make_backend())) == ([CLS], [SEP], [SEP], 1, True)
    assert pair_frame(Tokenizer(StandInBackend(300))) == ([], [], [], 0, False)
    assert encode_pair(
        Tokenizer(StandInBackend(300)), pair_frame(Tokenizer(StandInBackend(300))), "a", "bc", PairLimits()
    ) == (
        [97, 98, 99],
        0,
    )


@given(first=TEXTS, second=TEXTS, limits=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_each_text_has_a_limit(first: str, second: str, limits: tuple[int, int]) -> None:
    tokenizer = Tokenizer(make_backend())
    frame = pair_frame(tokenizer)
    short = [" ".join(text.split()[:most]) for text, most in zip((first, second), limits, strict=True)]
    cut = encode_pair(tokenizer, frame, first, second, PairLimits(None, *limits))
    assert cut == encode_pair(tokenizer, frame, short[0], short[1], PairLimits())


def test_pairs_are_one_to_many_or_many_to_many() -> None:
    fields = ("query", "documents")
    assert make_pairs("a", ["b", "c"], fields) == [("a", "b"), ("a", "c")]
    assert make_pairs(["a", "b"], ["c", "d"], fields) == [("a", "c"), ("b", "d")]
    for first, second, field in ((["a", "b"], ["c"], "documents"), ([], ["c"], "query"), ("a", [], "documents")):
        with pytest.raises(RequestError) as caught:
            make_pairs(first, second, fields)
        assert caught.value.field == field
