"""Ids of tool calls."""

import re
import secrets
import string
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

ALPHANUMERIC = string.ascii_letters + string.digits
MISTRAL_LENGTH = 9
MISTRAL_ID = re.compile(r"[A-Za-z0-9]{9}")

NewId = Callable[[], str]


def new_id() -> str:
    """An id in OpenAI's form."""
    return f"call_{secrets.token_hex(12)}"


def new_mistral_id() -> str:
    """An id of nine letters and digits, the only form that Mistral's chat formats accept in histories."""
    return "".join(secrets.choice(ALPHANUMERIC) for _ in range(MISTRAL_LENGTH))


def with_mistral_ids(message: dict[str, Any]) -> dict[str, Any]:
    """A message of a conversation with ids that Mistral's chat formats accept; equal ids stay equal."""
    changed = dict(message)
    if isinstance(message.get("tool_call_id"), str):
        changed["tool_call_id"] = _as_mistral_id(message["tool_call_id"])
    if message.get("tool_calls"):
        changed["tool_calls"] = [
            call | {"id": _as_mistral_id(call["id"])} if isinstance(call.get("id"), str) else call
            for call in message["tool_calls"]
        ]
    return changed


def _as_mistral_id(given: str) -> str:
    if MISTRAL_ID.fullmatch(given):
        return given
    number = int.from_bytes(blake2b(given.encode("utf-8", "surrogatepass"), digest_size=8).digest())
    letters = []
    for _ in range(MISTRAL_LENGTH):
        number, at = divmod(number, len(ALPHANUMERIC))
        letters.append(ALPHANUMERIC[at])
    return "".join(letters)
