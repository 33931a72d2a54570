"""Refuses what the library of grammars would neither enforce nor refuse in a JSON schema, so that all outputs conform.

Unknown keywords are annotations, as the standard has it. What the library knows and lacks it refuses itself.
"""

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from engine.errors import RequestError

# Where schemas have subschemas: in place of the keyword's value, as values of an object, and as items of a list.
_ONE = ("items", "additionalItems", "additionalProperties")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_LISTED = ("items", "prefixItems", "allOf", "anyOf", "oneOf")
_OLD = ("disallow", "divisibleBy", "extends")  # of drafts before 4, with other names since

# Escapes in strings. Without \u a name has one form, so that no additional property can have that of a declared one.
ESCAPES = 'nrbtf\\"'
ALL_ESCAPES = ESCAPES + "u"
_CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f]")  # without an escape of their own


def check_schema(schema: Any) -> str:
    """Check a schema; keywords without effect are removed from it. Returns the escapes that strings may have.

    Raises:
        RequestError: with the position, as a JSON pointer.
    """
    found = dict(_walk(schema))
    for at, one in found.items():
        if isinstance(one, dict):
            _check(at, one)
        elif not isinstance(one, bool):
            raise RequestError(f"{at} must be a schema, so an object or a boolean")
    if (endless := _endless(found)) is not None:
        raise RequestError(f"no output conforms to it: {endless} requires itself without an end")
    if not any(map(_CONTROL.search, _texts(schema))):
        return ESCAPES
    for at, one in found.items():
        if isinstance(one, dict) and (one.get("properties") or one.get("required")) and _is_open(one):
            raise RequestError(f"{at} needs additionalProperties: false, since the schema has control characters")
    return ALL_ESCAPES


def _walk(schema: Any) -> Iterator[tuple[str, Any]]:
    """A schema and its subschemas, with their positions."""
    left = [("#", schema)]
    while left:
        at, one = left.pop()
        yield at, one
        if not isinstance(one, dict):
            continue
        left += [(f"{at}/{key}", one[key]) for key in _ONE if key in one and not isinstance(one[key], list)]
        for key in _NAMED:
            if isinstance(named := one.get(key), dict):
                left += [(f"{at}/{key}/{_escaped(name)}", value) for name, value in named.items()]
        for key in _LISTED:
            if isinstance(listed := one.get(key), list):
                left += [(f"{at}/{key}/{number}", value) for number, value in enumerate(listed)]


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _check(at: str, schema: dict[str, Any]) -> None:
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]
    for key in _OLD:
        if key in schema:
            raise RequestError(f"{at}: the keyword {key} isn't supported")
    divisor = schema.get("multipleOf")
    if isinstance(divisor, int | float) and divisor <= 0:
        raise RequestError(f"{at}/multipleOf must be above 0")
    least, required = schema.get("minProperties"), schema.get("required")
    certain = len(set(map(str, required))) if isinstance(required, list) else 0
    if isinstance(least, int) and least > certain + 1 and _is_open(schema):
        raise RequestError(
            f"{at}/minProperties: more than one property beside the required ones can't be demanded, since the names "
            "of additional properties may repeat"
        )


def _is_open(schema: dict[str, Any]) -> bool:
    """Whether objects may have properties that are not declared."""
    return schema.get("additionalProperties") is not False or bool(schema.get("patternProperties"))


def _texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            left += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            left += one


# -------------------------------------------------------------------------------------------------------------- endless


def _endless(found: dict[str, Any]) -> str | None:
    """The position of a schema whose instances would never end, unless there is none; `found`: all, by position.

    A schema is finite if what it requires is; that is applied until nothing changes.
    """
    if any(isinstance(one, dict) and "$id" in one for at, one in found.items() if at != "#"):
        return None  # references are relative to these
    finite: set[str] = set()
    while more := {at for at, one in found.items() if at not in finite and _is_finite(at, one, finite, found)}:
        finite |= more
    # A part that is endless matters if the whole is.
    return None if "#" in finite else min((at for at in found if at not in finite), key=len)


def _is_finite(at: str, schema: Any, finite: set[str], found: dict[str, Any]) -> bool:
    if not isinstance(schema, dict) or "const" in schema or "enum" in schema:
        return True
    needed = [f"{at}/allOf/{number}" for number in range(_length(schema, "allOf"))]
    if isinstance(reference := schema.get("$ref"), str):
        needed.append(unquote(reference))
    kind = schema.get("type")
    if kind in ("object", ["object"]):
        needed += [_place_of_property(at, schema, name) for name in schema.get("required", []) if isinstance(name, str)]
    if kind in ("array", ["array"]) and isinstance(least := schema.get("minItems", 0), int) and least > 0:
        listed = "prefixItems" if "prefixItems" in schema else "items"
        count = _length(schema, listed)
        needed += [f"{at}/{listed}/{number}" for number in range(min(least, count))]
        if least > count and not isinstance(schema.get("items"), list):
            needed.append(f"{at}/items")
    if any(place in found and place not in finite for place in needed):
        return False
    for key in ("anyOf", "oneOf"):
        options = [f"{at}/{key}/{number}" for number in range(_length(schema, key))]
        if options and not any(option in finite for option in options):
            return False
    return True


def _length(schema: dict[str, Any], key: str) -> int:
    value = schema.get(key)
    return len(value) if isinstance(value, list) else 0


def _place_of_property(at: str, schema: dict[str, Any], name: str) -> str:
    declared = schema.get("properties")
    if isinstance(declared, dict) and name in declared:
        return f"{at}/properties/{_escaped(name)}"
    return f"{at}/additionalProperties"
