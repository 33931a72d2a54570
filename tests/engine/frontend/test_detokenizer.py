import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.frontend.detokenizer import Detokenizer, StopStrings
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.tokenizer_backends import FastBackend
from tests.engine.frontend.conftest import CORPUS, byte_level_library, sentence_piece_library

BYTE_LEVEL = Tokenizer(FastBackend(byte_level_library()))
SENTENCE_PIECE = Tokenizer(FastBackend(sentence_piece_library()))

texts = st.text(max_size=40) | st.sampled_from(CORPUS)


def run(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    """The text of each token and of the end, up to a stop string."""
    shown = []
    for token in ids:
        text, stop = detokenizer.push(token)
        shown.append(text)
        if stop is not None:
            return shown
    return [*shown, detokenizer.finish()]


@given(texts)
def test_a_text_comes_back_whole_and_in_whole_characters(text: str):
    ids = BYTE_LEVEL.encode(text)
    shown = run(Detokenizer(BYTE_LEVEL), ids)
    assert "".join(shown) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in part for part in shown)


@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 5), max_size=30), st.booleans())
def test_any_ids_read_as_the_library_reads_them_whole(ids: list[int], skip: bool):
    shown = run(Detokenizer(BYTE_LEVEL, skip_special_tokens=skip), ids)
    assert "".join(shown) == BYTE_LEVEL.decode(ids, skip)


@given(st.text(alphabet="abcdefgh é😀", max_size=30))
def test_pieces_with_byte_fallback_come_back_whole(text: str):
    ids = SENTENCE_PIECE.encode(text, add_special_tokens=False)
    shown = run(Detokenizer(SENTENCE_PIECE), ids)
    assert "".join(shown) == SENTENCE_PIECE.decode(ids)
    assert all("\ufffd" not in part for part in shown)


@given(st.text(alphabet="ab ", min_size=1, max_size=12), st.text(alphabet="ab é", min_size=1, max_size=20))
def test_the_space_that_begins_an_output_stays(prompt: str, output: str):
    prompt_ids = SENTENCE_PIECE.encode(prompt, add_special_tokens=False)
    ids = SENTENCE_PIECE.encode(output, add_special_tokens=False)  # begins with ▁, as a word in a text does
    assert "".join(run(Detokenizer(SENTENCE_PIECE, prompt_ids), ids)) == " " + output


def test_bytes_that_never_become_a_character_are_not_held_for_ever():
    wrong = [SENTENCE_PIECE.backend.id_of("<0xFF>")] * 40
    shown = run(Detokenizer(SENTENCE_PIECE, [1]), wrong)
    assert sum(map(len, shown[:20])) > 0
    assert len("".join(shown)) == 40


def test_a_long_output_is_decoded_in_windows():
    ids = SENTENCE_PIECE.encode("ab é " * 200, add_special_tokens=False)
    assert "".join(run(Detokenizer(SENTENCE_PIECE), ids)) == SENTENCE_PIECE.decode(ids)


def first_stop(text: str, stops: list[str]) -> tuple[int, int] | None:
    """Where the text, read character by character, first completes a stop string: its begin and its end."""
    for end in range(1, len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return min(begins), end
    return None


def cut(text: str, borders: list[int]) -> list[str]:
    places = sorted({min(border, len(text)) for border in borders} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


@given(
    st.text(alphabet="ab\n", max_size=30),
    st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), min_size=1, max_size=3),
    st.lists(st.integers(0, 30), max_size=12),
    st.booleans(),
)
def test_stop_strings_are_found_wherever_the_pieces_end(text: str, stops: list[str], borders: list[int], include: bool):
    watch = StopStrings(stops, include)
    shown, found = "", None
    longest = max(map(len, stops))
    given_text = ""
    for piece in cut(text, borders):
        given_text += piece
        part, found = watch.push(piece)
        shown += part
        if found is not None:
            break
        assert len(given_text) - len(shown) < longest, "more is held back than may become a stop string"
    else:
        shown += watch.finish()
    expected = first_stop(text, stops)
    if expected is None:
        assert (shown, found) == (text, None)
    else:
        begin, end = expected
        assert found == text[begin:end]
        assert shown == (text[:end] if include else text[:begin])


def test_a_stop_string_across_tokens_never_shows_its_beginning():
    ids = BYTE_LEVEL.encode("the quick##END lazy")
    shown = run(Detokenizer(BYTE_LEVEL, stop=["##END"]), ids)
    assert "".join(shown) == "the quick"


def test_special_tokens_show_only_when_asked_for():
    ids = [*BYTE_LEVEL.encode("the"), BYTE_LEVEL.backend.id_of("<|end|>")]
    assert "".join(run(Detokenizer(BYTE_LEVEL), ids)) == "the"
    assert "".join(run(Detokenizer(BYTE_LEVEL, skip_special_tokens=False), ids)) == "the<|end|>"


@pytest.mark.parametrize(
    ("stops", "pieces", "early", "expected", "found"),
    [
        (["ab"], "xxabyyabz", 4, "xxabyy", "ab"),  # a piece is a letter: the first one ends with the fourth
        (["ab"], "xxabyyabz", 3, "xx", "ab"),  # it ends behind the early pieces, though it begins among them
        (["ab"], "xxabyyabz", 0, "xx", "ab"),
        (["ab"], "xxab", 4, "xxab", None),
        (["ab", "xabyz"], "qxabyzab", 4, "q", "xabyz"),  # held back early, passed over, and found as another's part
        (["ab", "xabyz"], "qxabyqabz", 4, "qxabyq", "ab"),
        (["aa"], "aaaa", 2, "a", "aa"),
    ],
)
def test_stop_strings_that_end_within_min_tokens_are_passed_over(
    stops: list[str], pieces: str, early: int, expected: str, found: str | None, stand_in: Tokenizer
):
    detokenizer = Detokenizer(stand_in, stop=stops, min_tokens=early)
    text, stop = "", None
    for letter in pieces:
        more, stop = detokenizer.push(ord(letter))
        text += more
        if stop is not None:
            break
    assert (text if stop is not None else text + detokenizer.finish(), stop) == (expected, found)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCE_PIECE], ids=["byte level", "pieces"])
@given(ids=st.lists(st.integers(0, 330), max_size=30), shown=st.booleans())
def test_chosen_special_tokens_stay_in_the_text(tokenizer: Tokenizer, ids: list[int], shown: bool):
    special = sorted(tokenizer.special_ids)
    visible = special[-1:] if shown else []
    kept = [token for token in ids if token not in special or token in visible]
    written = "".join(run(Detokenizer(tokenizer, visible_ids=visible), ids))
    assert written == "".join(run(Detokenizer(tokenizer, skip_special_tokens=False), kept))
