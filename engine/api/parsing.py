"""From the bytes of a request to its fields: msgspec refuses a wrong type by the name of its field."""

import re
from typing import Any, TypeVar

import msgspec

from engine.errors import RequestError

Body = TypeVar("Body", bound=msgspec.Struct)

_decoders: dict[type, msgspec.json.Decoder[Any]] = {}
_place = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<field>.*)`)?$", re.DOTALL)


def parse(data: bytes, kind: type[Body]) -> Body:
    """Decode a request body; RequestError names the field that can't be read."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        body: Body = decoder.decode(data)
    except msgspec.ValidationError as error:
        match = _place.match(str(error))
        assert match is not None
        what, field = match["what"], match["field"]
        if missing := re.fullmatch(r"Object missing required field `(\w+)`", what):
            field = f"{field}.{missing[1]}" if field else missing[1]
            raise RequestError(f"{field} is missing", field) from error
        what = what[:1].lower() + what[1:]
        raise RequestError(f"{field}: {what}" if field else f"the body: {what}", field or None) from error
    except msgspec.DecodeError as error:
        raise RequestError(f"the body is no JSON: {error}") from error
    return body
