"""A request's body: received up to a limit, measured before it is decoded, then decoded.

Decoding holds the interpreter from the first byte to the last. What a large body holds is therefore counted before, on
a thread and by functions that let go of the interpreter, so that a body of millions of values stops no stream.
"""

import asyncio
import re
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np
from starlette.requests import Request

from engine.api.errors import ApiError
from engine.api.options import Limits
from engine.api.parsing import parse

Body = TypeVar("Body", bound=msgspec.Struct)

BACKSLASH = ord("\\")
NO_BACKSLASH = re.compile(rb"[^\\]")
SMALL_BODY = 128 << 10  # decoded without counting: it holds too little to take long
PIECE = 1 << 20  # bytes that are counted at a time, so that counting takes no memory to speak of
# A list or an object takes about eight times as long to make as a number.
CONTAINER_WEIGHT = 8


async def read_json(request: Request, kind: type[Body], limits: Limits) -> Body:
    """Receive and decode a body; ApiError or RequestError if it is no JSON of this kind, or more than the limits."""
    data = await receive(request, limits.max_body_bytes)
    if len(data) > SMALL_BODY:
        check_values(await asyncio.to_thread(count_values, data), limits.max_body_values)
    return parse(bytes(data), kind)


async def receive(request: Request, limit: int) -> bytearray:
    """The body's bytes; ApiError 413 as soon as there are more than `limit`, or the header says so."""
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
        413, f"the body has more than {limit:,} bytes, which is this server's limit (--max-body-bytes)",
        code="request_too_large",
    )  # fmt: skip


class Values(NamedTuple):
    """How many JSON values a body holds."""

    all: int
    containers: int  # lists and objects among them


def count_values(data: bytes | bytearray) -> Values:
    """Count without decoding: commas and opening brackets outside of strings. What is no JSON gives some number."""
    commas = openers = 0
    in_string = 0
    begin, view = 0, memoryview(data)
    while begin < len(data):
        end = min(begin + PIECE, len(data))
        if data[end - 1] == BACKSLASH and (match := NO_BACKSLASH.search(data, end)):  # an escape is not cut in two
            end = match.end()
        piece = bytes(view[begin:end]).replace(b"\\\\", b"__").replace(b'\\"', b"__")
        codes = np.frombuffer(piece, np.uint8)
        strings = np.bitwise_xor.accumulate((codes == ord('"')).view(np.uint8))
        outside = strings == in_string  # an even number of quotes came before
        commas += int(np.count_nonzero((codes == ord(",")) & outside))
        openers += int(np.count_nonzero(((codes == ord("[")) | (codes == ord("{"))) & outside))
        in_string ^= int(strings[-1])
        begin = end
    return Values(1 + commas + openers, openers)


def check_values(found: Values, limit: int) -> None:
    """Raise ApiError 413 for a body that holds more JSON values than `limit`."""
    if found.all > limit:
        message = f"the body holds {found.all:,} JSON values"
    elif found.containers * CONTAINER_WEIGHT > limit:
        message = (
            f"the body holds {found.containers:,} JSON lists and objects, each of which counts as {CONTAINER_WEIGHT}"
        )
    else:
        return
    raise ApiError(413, f"{message}; this server takes {limit:,} values (--max-body-values)", code="request_too_large")
