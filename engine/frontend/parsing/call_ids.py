"""Ids of tool calls."""

import secrets
import string
from collections.abc import Callable

ALPHANUMERIC = string.ascii_letters + string.digits

NewId = Callable[[], str]


def new_id() -> str:
    """An id in OpenAI's form."""
    return f"call_{secrets.token_hex(12)}"


def new_mistral_id() -> str:
    """An id of nine letters and digits, the only form that mistral-common accepts in histories."""
    return "".join(secrets.choice(ALPHANUMERIC) for _ in range(9))
