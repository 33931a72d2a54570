"""Placeholders become the tokens of their inputs, in order, or the request is refused."""

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import RequestError
from engine.multimodal.expansion import expand, with_surroundings

PLACEHOLDERS = {"image": 7, "video": 8}
TEXTS = {"image": "<image>", "video": "<video>"}


class Input(NamedTuple):
    kind: str
    tokens: list[int]
    before: str = ""
    after: str = ""


def test_inputs_replace_the_placeholders_of_their_kind_in_order() -> None:
    first, second, film = Input("image", [7, 7, 7]), Input("image", [7, 9, 7]), Input("video", [8])
    ids, placed = expand([1, 7, 2, 8, 7, 3], [first, film, second], PLACEHOLDERS)
    assert ids == [1, 7, 7, 7, 2, 8, 7, 9, 7, 3]
    assert placed == [(1, first), (5, film), (6, second)]


def test_text_around_placeholders() -> None:
    one = Input("image", [7, 7], "[", "]")
    assert with_surroundings("a<image>b<video>", [one, Input("video", [8])], TEXTS) == "a[<image>]b<video>"
    ids, placed = expand([1, 7, 2], [one], PLACEHOLDERS, encode=lambda text: [ord(text)])
    assert ids == [1, 91, 7, 7, 93, 2]
    assert placed == [(2, one)]
    assert expand([1, 7, 2], [one], PLACEHOLDERS) == ([1, 7, 7, 2], [(1, one)])


@pytest.mark.parametrize(
    ("ids", "kinds", "reason"),
    [
        ([1, 7], [], "has 1 placeholders (<image>) for 0 images"),
        ([1], ["image"], "has 0 placeholders (<image>) for 1 image:"),
        ([7, 7], ["image"], "has 2 placeholders (<image>) for 1 image:"),
        ([7], ["video"], "placeholders"),
    ],
)
def test_other_numbers_are_refused(ids: list[int], kinds: list[str], reason: str) -> None:
    inputs = [Input(kind, [5]) for kind in kinds]
    with pytest.raises(RequestError) as caught:
        expand(ids, inputs, PLACEHOLDERS, texts=TEXTS)
    assert reason in str(caught.value)
    with pytest.raises(RequestError, match="placeholders"):
        with_surroundings("".join({7: "<image>"}.get(token, "x") for token in ids), inputs, TEXTS)


@given(st.lists(st.one_of(st.integers(0, 6), st.tuples(st.sampled_from(["image", "video"]), st.integers(1, 5)))))
def test_every_offset_points_at_its_input(parts: list[int | tuple[str, int]]) -> None:
    inputs = [Input(part[0], [100 + number] * part[1]) for number, part in enumerate(parts) if isinstance(part, tuple)]
    ids = [PLACEHOLDERS[part[0]] if isinstance(part, tuple) else part for part in parts]
    found, placed = expand(ids, inputs, PLACEHOLDERS)
    assert len(placed) == len(inputs)
    for offset, one in placed:
        assert found[offset : offset + len(one.tokens)] == one.tokens
    others = [token for token in found if token < 7]
    assert others == [part for part in parts if not isinstance(part, tuple)]
