"""The reader agrees with a whole-text decoder about which texts are JSON objects, and where they end."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from engine.frontend.parsing.json_reader import JsonReader
from tests.engine.frontend.parsing.texts import JSON_VALUES, OBJECTS, divided, texts_of

NUMBERS = st.sampled_from(("0", "-0", "01", "1.", ".5", "1e5", "1E+5", "1e", "-", "1.5e-3", "NaN", "Infinity", "truex"))


def decoded(text: str) -> tuple[Any, int] | None:
    """The value that a text begins with, and where it ends."""

    def refuse(_: str) -> None:
        raise ValueError

    try:
        return json.JSONDecoder(parse_constant=refuse).raw_decode(text)
    except (ValueError, RecursionError):
        return None


@given(divided(texts_of(OBJECTS.map(json.dumps), NUMBERS, '"\\u00e9"', '"\\x"', '"\n"', '{"a": ').map("{".__add__)))
def test_it_ends_where_the_object_ends(parts: list[str]) -> None:
    text, reader = "", JsonReader(0)
    for part in parts:
        text += part
        reader.read(text)
        assert reader.at <= len(text)
    found = decoded(text)
    assert reader.done == (found is not None)
    if found is not None:
        assert reader.at == found[1]


@given(st.dictionaries(st.text(max_size=4), JSON_VALUES, min_size=1, max_size=4), st.sampled_from([None, 1]))
def test_members_are_those_of_the_object(value: dict[str, Any], indent: int | None) -> None:
    text = " x " + json.dumps(value, indent=indent, ensure_ascii=False) + " y"
    reader = JsonReader(3)
    assert reader.read(text)
    found = [(json.loads(text[a:b]), json.loads(text[c:d])) for a, b, c, d in reader.members]
    assert found == list(value.items())
    assert not reader.broken
