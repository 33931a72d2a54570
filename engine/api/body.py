"""The body of a request: received up to a limit, checked for the number of its values, then decoded.

Decoding holds the GIL throughout. The values of a large body are therefore counted first, on a thread and by functions
that release the GIL, so that a body of millions of values does not stop the streams.
"""

import asyncio
import re
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np
from starlette.requests import Request

from engine.api.error_responses import ApiError
from engine.api.http_options import Limits
from engine.api.parsing import parse

Body = TypeVar("Body", bound=msgspec.Struct)

BACKSLASH = ord("\\")
NO_BACKSLASH = re.compile(rb"[^\\]")
SMALL_BODY = 128 << 10  # bytes; decoded without counting, since it is quick
PIECE = 1 << 20  # bytes counted at a time, to bound the memory for counting
# Creating a list or an object takes about eight times as long as a number.
CONTAINER_WEIGHT = 8


async def read_json(request: Request, kind: type[Body], limits: Limits, *, takes_media: bool = False) -> Body:
    """Receive and decode a body. Raises ApiError or RequestError if it is not valid for `kind`, or over a limit.

    `takes_media`: whether the model takes images, audio or video, so that bodies are larger.
    """
    data = await receive(request, limits.largest_body(takes_media=takes_media))
    if len(data) > SMALL_BODY:
        check_values(await asyncio.to_thread(count_values, data), limits.max_body_values)
    return parse(data, kind)


async def receive(request: Request, limit: int) -> bytearray:
    """The bytes of the body. Raises ApiError 413 as soon as they, or the content-length, exceed `limit`."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large(limit)
    data = bytearray()
    async for piece in request.stream():
        if len(data) + len(piece) > limit:
            raise too_large(limit)
        data += piece
    return data


def too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"the body has more than {limit:,} bytes, the limit of this server (--max-body-bytes)",
        code="request_too_large",
    )  # fmt: skip


class Values(NamedTuple):
    """Numbers of JSON values in a body."""

    all: int
    containers: int  # lists and objects among `all`


def count_values(data: bytes | bytearray) -> Values:
    """Count commas and opening brackets outside of strings, without decoding. Any number for invalid JSON."""
    commas = openers = 0
    in_string = 0
    begin, view = 0, memoryview(data)
    while begin < len(data):
        end = min(begin + PIECE, len(data))
        if data[end - 1] == BACKSLASH and (match := NO_BACKSLASH.search(data, end)):  # do not cut an escape in two
            end = match.end()
        piece = bytes(view[begin:end]).replace(b"\\\\", b"__").replace(b'\\"', b"__")
        codes = np.frombuffer(piece, np.uint8)
        strings = np.bitwise_xor.accumulate((codes == ord('"')).view(np.uint8))
        outside = strings == in_string  # an even number of quotes precedes
        commas += int(np.count_nonzero((codes == ord(",")) & outside))
        openers += int(np.count_nonzero(((codes == ord("[")) | (codes == ord("{"))) & outside))
        in_string ^= int(strings[-1])
        begin = end
    return Values(1 + commas + openers, openers)


def check_values(found: Values, limit: int) -> None:
    """Raise ApiError 413 for a body with more JSON values than `limit`."""
    if found.all > limit:
        message = f"the body has {found.all:,} JSON values"
    elif found.containers * CONTAINER_WEIGHT > limit:
        message = (
            f"the body has {found.containers:,} JSON lists and objects, each of which counts as {CONTAINER_WEIGHT}"
        )
    else:
        return
    raise ApiError(413, f"{message}; the limit is {limit:,} values (--max-body-values)", code="request_too_large")
