"""Fields that the bodies of all requests to a model have, and the forms of its prompts."""

from collections.abc import Sequence
from typing import Protocol

from engine.api.request_id import LONGEST_ID
from engine.errors import RequestError

MAX_SALT = 1024  # characters; each block of a prompt is hashed with it


class Bookkeeping(Protocol):
    """The fields about scheduling and the log."""

    cache_salt: str | None
    priority: int | None
    request_id: str | None


def check_bookkeeping(body: Bookkeeping) -> None:
    """Raise RequestError for a field that is out of range."""
    if body.priority is not None and not -(2**63) <= body.priority < 2**63:
        raise RequestError(f"priority must lie in -2^63..2^63 - 1, not {body.priority:.3g}", "priority")
    for field, most in (("cache_salt", MAX_SALT), ("request_id", LONGEST_ID)):
        if len(getattr(body, field) or "") > most:
            raise RequestError(f"{field} must have at most {most:,} characters", field)


def split_prompts(given: str | Sequence[str | int | list[int]], field: str) -> list[str | list[int]]:
    """Texts or token ids, from any of the four forms. Raises RequestError, with the field."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise RequestError(f"{field} is an empty list", field)
    kinds = {type(part) for part in given}
    if kinds == {int}:
        return [list(given)]  # type: ignore[arg-type]
    if len(kinds) > 1:
        raise RequestError(f"{field} mixes texts and token ids in one list", field)
    return list(given)  # type: ignore[arg-type]
