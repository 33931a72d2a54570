"""Decoding of request bodies; errors name the field."""

import re
from typing import Any, TypeVar

import msgspec

from engine.api.unsupported_fields import check_unknown_fields
from engine.errors import RequestError

Body = TypeVar("Body", bound=msgspec.Struct)

_decoders: dict[type, msgspec.json.Decoder[Any]] = {}
_field_names: dict[type, frozenset[str]] = {}
_raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_place = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<field>.*)`)?$", re.DOTALL)


def field_names(data: bytes | bytearray) -> frozenset[str]:
    """The names of the fields of a body that are not null; none if it is no object, which `parse` reports."""
    try:
        given = _raw_fields.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return frozenset()
    return frozenset(name for name, raw in given.items() if memoryview(raw) != b"null")


def parse(data: bytes | bytearray, kind: type[Body]) -> Body:
    """Decode a request body.

    As in servers that use pydantic, an integer may be written as 4.0 or "4", and true as 1.

    Args:
        data: the body, JSON in UTF-8.
        kind: the struct of its fields.

    Raises:
        RequestError: the body is not valid; the message names the field if possible.
    """
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind, strict=False)
        _field_names[kind] = frozenset(field.encode_name for field in msgspec.structs.fields(kind))
    try:
        data.isascii() or data.decode()  # msgspec does not check the bytes of fields that it skips
        body: Body = decoder.decode(data)
        given = _raw_fields.decode(data)
        unknown = given.keys() - _field_names[kind]
        if unknown:
            check_unknown_fields({name: given[name] for name in sorted(unknown)})
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from error
    except msgspec.DecodeError as error:
        what = str(error)
        if "truncated" in what:  # msgspec's message also for "\ud800" at the end of a text
            what = "it ends early, or a text contains a lone surrogate"
        raise RequestError(f"the body isn't valid JSON: {what}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"the body isn't valid UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise RequestError("the body is nested too deeply") from error
    return body


def _refusal(text: str) -> RequestError:
    """The message of a ValidationError, with the field first."""
    match = _place.match(text)
    assert match is not None
    what, field = match["what"], match["field"]
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", what):
        field = f"{field}.{missing[1]}" if field else missing[1]
        return RequestError(f"{field} is missing", field)
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", what, re.DOTALL):
        field = f"{field}.{unknown[1]}" if field else unknown[1]
        return RequestError(f"{field} is not supported here", field)
    what = what[:1].lower() + what[1:]
    return RequestError(f"{field}: {what}" if field else f"the body: {what}", field or None)
