"""Truncated prompts keep what a tokenizer puts before each text."""

import pytest

from engine.frontend.sampling_params import SamplingParams
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.truncation import encode_end, kept_tokens, truncate

PROMPT = [1, *range(10, 20)]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, PROMPT),
        ({"truncate_prompt_tokens": 11}, PROMPT),
        ({"truncate_prompt_tokens": 4}, [1, 17, 18, 19]),
        ({"truncate_prompt_tokens": 1}, [19]),
        ({"truncate_prompt_tokens": 4, "truncation_side": "right"}, [1, 10, 11, 12]),
        ({"truncate_prompt_tokens": -1, "max_tokens": 5}, [1, *range(13, 20)]),  # 13 tokens fit together
        ({"truncate_prompt_tokens": -1, "max_tokens": None}, PROMPT),
    ],
)
def test_so_many_tokens_are_kept(fields: dict, expected: list[int]):
    params = SamplingParams(**fields)
    assert truncate(PROMPT, kept_tokens(params, 13), params.truncation_side, (1,)) == expected


def test_ids_that_do_not_begin_so_are_cut_plainly():
    assert truncate(PROMPT[1:], 4, None, (1,)) == [16, 17, 18, 19]
    assert truncate(PROMPT, 4, None, ()) == [16, 17, 18, 19]


class Counting(Tokenizer):
    """Remembers how much text it was given."""

    characters = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.characters += len(text)
        return super().encode(text, add_special_tokens)


@pytest.mark.parametrize("text", ["the quick brown fox " * 5000, " " * 100_000 + "fox", "the " * 20])
@pytest.mark.parametrize("side", [None, "right"])
def test_of_a_long_text_only_what_is_kept_is_tokenized(text: str, side: str | None, byte_level: Tokenizer):
    tokenizer = Counting(byte_level.backend)
    ids, cut = encode_end(tokenizer, text, 20, side, True)
    whole = byte_level.encode(text)
    assert truncate(ids, 20, side, ()) == truncate(whole, 20, side, ())
    assert cut == (len(ids) < len(whole))
    if len(whole) > 1000:
        assert tokenizer.characters <= 4 * 16 * (20 + 64)
