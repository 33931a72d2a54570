"""Responses that later requests may name, in the memory of one API process."""

import re
import uuid
from collections import Counter, OrderedDict
from typing import Any

import msgspec

from engine.api.error_responses import ApiError
from engine.api.http_options import Limits

OWN_ID = re.compile(r"resp_[0-9a-f]{32}([0-9a-f]{2})")  # the last digits are the number of the API process
Item = dict[str, Any]

_items = msgspec.json.Decoder(list[Item])


class Turn:
    """The items of an input or of an output, as JSON; conversations share those that they have in common."""

    __slots__ = ("data",)

    def __init__(self, items: list[Item]):
        self.data = msgspec.json.encode(items)

    @classmethod
    def of_data(cls, data: bytes) -> "Turn":
        """A turn from its JSON."""
        turn = cls.__new__(cls)
        turn.data = data
        return turn

    @property
    def items(self) -> list[Item]:
        return _items.decode(self.data)


class StoredResponse(msgspec.Struct, frozen=True):
    """One response.

    Attributes:
        body: JSON, as it was sent.
        turns: the whole conversation, from its first input to the output of this response.
        owner: number of the API key that it belongs to; None if there are no keys.
    """

    body: bytes
    turns: tuple[Turn, ...]
    owner: int | None


class ResponseStore:
    """The responses used last, up to a number and up to a number of bytes."""

    def __init__(self, limits: Limits, process: int):
        """`process` is the number of this API process, which ids contain."""
        self._most = limits.max_stored_responses
        self._most_bytes = limits.max_stored_bytes
        self._process = process
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()
        self._uses: Counter[Turn] = Counter()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    def new_id(self) -> str:
        """An id for a response of this process."""
        return f"resp_{uuid.uuid4().hex}{self._process:02x}"

    def put(self, name: str, response: StoredResponse) -> None:
        """Keep a response; those that were not used for the longest time are evicted if there are too many."""
        self._stored[name] = response
        self.num_bytes += len(response.body)
        for turn in response.turns:
            self._uses[turn] += 1
            if self._uses[turn] == 1:
                self.num_bytes += len(turn.data)
        while self._stored and (len(self._stored) > self._most or self.num_bytes > self._most_bytes):
            self._remove(next(iter(self._stored)))

    def get(self, name: str, owner: int | None, param: str | None = None) -> StoredResponse:
        """A response of this owner. Raises ApiError 404 if it is not stored; `param` is the field that names it."""
        found = self._stored.get(name)
        if found is None or found.owner != owner:
            raise missing(name, param)
        self._stored.move_to_end(name)
        return found

    def delete(self, name: str, owner: int | None) -> None:
        """Forget a response of this owner. Raises ApiError 404 if it is not stored."""
        self.get(name, owner)
        self._remove(name)

    def _remove(self, name: str) -> None:
        response = self._stored.pop(name)
        self.num_bytes -= len(response.body)
        for turn in response.turns:
            self._uses[turn] -= 1
            if not self._uses[turn]:
                del self._uses[turn]
                self.num_bytes -= len(turn.data)


def process_of(name: str) -> int | None:
    """The number of the API process that made a response; None for an id that no process made."""
    match = OWN_ID.fullmatch(name)
    return int(match[1], 16) if match else None


def missing(name: str, param: str | None) -> ApiError:
    """The error for a response that is not stored; `param` is the field that names it."""
    return ApiError(
        404,
        f"the response {name!r} is not stored here: it is unknown, was deleted or sent with store: false, or was "
        "evicted (--max-stored-responses, --max-stored-bytes)",
        param=param,
        code="response_not_found",
    )
