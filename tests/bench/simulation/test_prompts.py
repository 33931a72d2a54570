import math

from hypothesis import given
from hypothesis import strategies as st

from bench.simulation.prompts import prompt_ids, text_ids
from bench.workloads.base import RequestSpec


@given(st.text(), st.text(min_size=1), st.text())
def test_texts_that_begin_alike_have_ids_that_begin_alike(common: str, first: str, second: str) -> None:
    shared = len(common) // 4
    one, other = text_ids(common + first), text_ids(common + second)
    assert one[:shared].tolist() == other[:shared].tolist()
    assert len(one) == max(1, math.ceil(len(common + first) / 4))
    assert (one >= 0).all()


def test_other_texts_have_other_ids() -> None:
    texts = [f"{a}{b}{c}d" for a in "abcdef" for b in "abcdef" for c in "abcdef"]
    assert len({int(text_ids(text)[0]) for text in texts}) == len(texts)


def test_chats_and_ids() -> None:
    turn = {"role": "user", "content": "What is a cache?"}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A memory."}]}
    first = prompt_ids(RequestSpec(5, 1, messages=[turn]))
    both = prompt_ids(RequestSpec(9, 1, messages=[turn, answer, turn]))
    assert list(both[: len(first) - 1]) == list(first[:-1])
    assert list(prompt_ids(RequestSpec(2, 1, prompt_ids=[5, 6]))) == [5, 6]
