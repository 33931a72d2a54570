"""Each keyword of JSON schema, drafts 7 to 2020-12: outputs validate, or the schema is refused with the reason."""

import datetime
import ipaddress
import json
import random
import re
import uuid
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from jsonschema.validators import validator_for

from engine.errors import RequestError
from engine.grammar import Grammar
from tests.engine.core.json_walks import Walks

CASES = [json.loads(line) for line in Path(__file__).with_name("json_schemas.jsonl").read_text().splitlines()]
WALKS = 8  # for each schema
# Keywords that say something about an instance.
KEYWORDS = {
    "type", "enum", "const", "properties", "required", "additionalProperties", "patternProperties", "propertyNames",
    "minProperties", "maxProperties", "items", "prefixItems", "additionalItems", "contains", "minContains",
    "maxContains", "uniqueItems", "minItems", "maxItems", "pattern", "minLength", "maxLength", "format", "minimum",
    "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "anyOf", "oneOf", "allOf", "not", "if", "then",
    "else", "dependencies", "dependentRequired", "dependentSchemas", "unevaluatedProperties", "unevaluatedItems",
    "$ref", "$defs", "definitions", "$anchor", "$id", "$dynamicRef", "$recursiveRef", "$schema", "contentEncoding",
    "contentMediaType", "contentSchema",
}  # fmt: skip


@pytest.fixture(scope="module")
def walks() -> Walks:
    return Walks()


def name_of(case: dict[str, Any]) -> str:
    return f"{case['of']} {json.dumps(case['schema'])[:60]}"


@pytest.mark.parametrize("case", [case for case in CASES if "refused" not in case], ids=name_of)
def test_outputs_validate(walks: Walks, case: dict[str, Any]) -> None:
    schema, luck = case["schema"], random.Random(1)
    draw, validate = walks.start(schema), validator_of(schema)
    for _ in range(WALKS):
        text = draw(luck).decode()
        try:
            validate(json.loads(text, parse_float=exact))
        except jsonschema.ValidationError as error:
            raise AssertionError(f"{text} does not conform to {schema}: {error.message}") from error


@pytest.mark.parametrize("case", [case for case in CASES if "refused" in case], ids=name_of)
def test_what_is_not_enforced_is_refused_with_the_reason(walks: Walks, case: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as refused:
        walks.start(case["schema"])
    assert case["refused"] in str(refused.value)


OPEN = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}
TAG = {"structures": [{"begin": "<f>", "schema": OPEN, "end": "</f>"}], "triggers": ["<f"]}


@pytest.mark.parametrize(
    ("grammar", "before"),
    [(Grammar("json_schema", json.dumps(OPEN)), ""), (Grammar("structural_tag", json.dumps(TAG)), "so <f>")],
    ids=["schema", "structural tag"],
)
def test_names_and_white_space_have_one_form(walks: Walks, grammar: Grammar, before: str) -> None:
    """An escaped name would be an additional property to the grammar, and the declared one to a parser."""
    for text in ('{"a": 5, "b": "x"}', '{"b": "\\n"}', '{\n    "ab":"x"}'):
        assert walks.allows(grammar, before + text), text
    for text in (r'{"\u0061": "x"', r'{"b": "\u0061', '{"a": "x', '{"b":  "x', '{"b"\n\n'):
        assert not walks.allows(grammar, before + text), text


def test_schemas_in_structural_tags_are_checked(walks: Walks) -> None:
    tag = {**TAG, "structures": [{"begin": "<f>", "schema": {"minProperties": 3}, "end": ""}]}
    with pytest.raises(RequestError, match="#/minProperties"):
        walks.allows(Grammar("structural_tag", json.dumps(tag)), "")


def test_every_keyword_has_a_case() -> None:
    assert len(CASES) >= 200
    texts = " ".join(json.dumps(case["schema"]) for case in CASES)
    assert [one for one in sorted(KEYWORDS) if f'"{one}": ' not in texts] == []


def exact(text: str) -> Decimal | float:
    """0.07 is a multiple of 0.01, but not in binary."""
    try:
        return Decimal(text)
    except InvalidOperation:  # an exponent that Decimal does not have
        return float(text)


def validator_of(schema: dict[str, Any]) -> Callable[[Any], None]:
    in_decimal = json.loads(json.dumps(schema), parse_float=exact)
    kind = validator_for(schema, default=jsonschema.Draft202012Validator)
    kind.check_schema(schema)
    validate: Callable[[Any], None] = kind(in_decimal, format_checker=FORMATS).validate
    return validate


FORMATS = jsonschema.FormatChecker(formats=())


def checks(name: str) -> Callable[[Callable[[str], object]], None]:
    """Register a check of a format: a wrong text raises ValueError, or gives a false value."""

    def register(check: Callable[[str], object]) -> None:
        FORMATS.checks(name, raises=ValueError)(lambda value: not isinstance(value, str) or bool(check(value)))

    return register


_TIME = r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?(Z|z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"


@checks("date")
def _date(text: str) -> object:
    return re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text) and (
        # RFC 3339 has a year 0, which was a leap year; Python has none.
        datetime.date.fromisoformat(text.replace("0000", "2000", 1) if text.startswith("0000") else text)
    )


@checks("time")
def _time(text: str) -> object:
    return re.fullmatch(_TIME, text, re.ASCII)


@checks("date-time")
def _date_time(text: str) -> object:
    return _date_of(text[:10]) and text[10] in "Tt " and re.fullmatch(_TIME, text[11:], re.ASCII)


def _date_of(text: str) -> bool:
    return FORMATS.conforms(text, "date")


@checks("duration")
def _duration(text: str) -> object:
    time = r"T(?=\d)(\d+H)?(\d+M)?(\d+S)?"
    return re.fullmatch(rf"P(?=[\dT])((\d+Y)?(\d+M)?(\d+D)?({time})?|\d+W)", text, re.ASCII)


@checks("email")
def _email(text: str) -> object:
    return re.fullmatch(r"[^\s@]+@[^\s@]+", text) or re.fullmatch(r'".*"@[^\s@]+', text)


@checks("hostname")
def _hostname(text: str) -> object:
    return len(text) <= 253 and re.fullmatch(rf"{_LABEL}(\.{_LABEL})*", text)


@checks("ipv4")
def _ipv4(text: str) -> object:
    return ipaddress.IPv4Address(text)


@checks("ipv6")
def _ipv6(text: str) -> object:
    return "%" not in text and ipaddress.IPv6Address(text)


@checks("uuid")
def _uuid(text: str) -> object:
    return re.fullmatch(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}", text) and uuid.UUID(text)


@checks("uri")
def _uri(text: str) -> object:
    return re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*:([A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*", text)
