"""Truncation that keeps special tokens, and embeddings made of vectors."""

import numpy as np
import pytest

from engine.errors import RequestError
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.vectors import check_dimensions, embedding_of, encode_truncated, score_of, special_frame
from engine.pooling import PoolingSpec
from tests.engine.frontend.pair_tokenizer import CLS, SEP, make_backend, words

SPEC = PoolingSpec("embed", "mean", 8)


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(make_backend())


def test_the_special_tokens_around_a_text(tokenizer: Tokenizer) -> None:
    assert special_frame(tokenizer) == ([CLS], [SEP])


@pytest.mark.parametrize(
    ("keep", "side", "special", "kept"),
    [
        (6, None, True, [CLS, *words("a b c d"), SEP]),
        (5, None, True, [CLS, *words("a b c"), SEP]),
        (5, "right", True, [CLS, *words("a b c"), SEP]),
        (5, "left", True, [CLS, *words("b c d"), SEP]),
        (3, "left", False, words("b c d")),
        (3, None, False, words("a b c")),
        (99, None, False, words("a b c d")),
        (99, None, True, [CLS, *words("a b c d"), SEP]),
    ],
)
def test_truncation_keeps_special_tokens(
    tokenizer: Tokenizer, keep: int, side: str | None, special: bool, kept: list[int]
) -> None:
    assert encode_truncated(tokenizer, "a b c d", keep, side, special) == kept


@pytest.mark.parametrize("side", ["left", "right"])
def test_of_a_very_long_text_only_a_part_is_tokenized(tokenizer: Tokenizer, side: str) -> None:
    text = "a " * 50_000 + "b"
    kept = encode_truncated(tokenizer, text, 4, side, True)
    assert kept == ([CLS, *words("a b"), SEP] if side == "left" else [CLS, *words("a a"), SEP])


def test_a_truncation_without_room_for_the_text_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="leaves no token for the text: the model adds 2 special tokens"):
        encode_truncated(tokenizer, "a b", 2, None, True)


def test_embeddings_are_cut_before_they_are_normalized() -> None:
    vector = np.arange(1, 9, dtype=np.float32)
    whole = embedding_of(vector, None, normalize=True)
    assert abs(np.linalg.norm(whole) - 1) < 1e-6
    cut = embedding_of(vector, 2, normalize=True)
    np.testing.assert_allclose(cut, np.array([1, 2]) / np.sqrt(5), rtol=1e-6)
    assert embedding_of(vector, 3, normalize=False).tolist() == [1, 2, 3]
    assert embedding_of(np.zeros(8, np.float32), None, normalize=True).tolist() == [0] * 8


def test_dimensions_of_a_matryoshka_model_without_a_list() -> None:
    spec = PoolingSpec("embed", "mean", 8, matryoshka=True)
    for allowed in (None, 1, 5, 8):
        check_dimensions(allowed, spec)
    for refused in (0, 9, -1):
        with pytest.raises(RequestError, match=r"dimensions must be one of 1\.\.8"):
            check_dimensions(refused, spec)
    check_dimensions(8, SPEC)


def test_scores_are_logits_or_their_sigmoids() -> None:
    logits, sigmoid = (PoolingSpec("classify", "head", 1, activation=one) for one in ("none", "sigmoid"))
    for value in (-1000.0, -2.5, 0.0, 3.0, 1000.0):
        vector = np.array([value], np.float32)
        assert score_of(vector, logits) == value
        assert abs(score_of(vector, sigmoid) - (0.5 + 0.5 * np.tanh(value / 2))) < 1e-12
