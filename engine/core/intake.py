"""Prepares arriving messages on the input thread: decodes and checks them, and hashes prompts.

If a message can't be read, its sender gets an error, as far as the message still identifies it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from engine.core.incoming_blocks import ArrivedBlocks
from engine.core.request import Request
from engine.errors import INTERRUPTS, RedlineError, cause_of
from engine.kv_transfer import PrefillEnded
from engine.messages import (
    Abort,
    AddRequest,
    Finished,
    FinishReason,
    FreeFeatures,
    Shutdown,
    Utility,
    UtilityResult,
    decode_to_core,
)
from engine.resolved_config import ResolvedConfig

log = logging.getLogger("redline.core")

ADD, UTILITY = 0, 2  # tags, see engine.messages
_INT64 = 2**63


@dataclass(slots=True)
class TextRequest:
    """A request that the loop has to tokenize, or whose multimodal inputs it has to place."""

    message: AddRequest
    arrived: float

    @property
    def handle(self) -> int:
        return self.message.handle


@dataclass(slots=True)
class RejectedRequest:
    """A request that can't be served, and why."""

    handle: int
    cause: str
    reason: FinishReason = FinishReason.ERROR
    message: AddRequest | None = None  # if it brought features

    def as_finished(self) -> Finished:
        return Finished(self.handle, self.reason, error=self.cause)


@dataclass(slots=True)
class RejectedCall:
    """A utility call that can't be read, and the answer to it."""

    front_end: int
    answer: UtilityResult


Arrival = (
    Request | TextRequest | RejectedRequest | RejectedCall | Abort | Utility | FreeFeatures | Shutdown | PrefillEnded
    | ArrivedBlocks
)  # fmt: skip


class Intake:
    """Turns encoded messages into arrivals. The input thread calls `read`; the loop also calls `make_request`."""

    def __init__(
        self,
        config: ResolvedConfig,
        adapter_key: Callable[[str], str | None],
        request_error: Callable[[Request], str | None],
        now: Callable[[], float],
        *,
        tokenizes_inline: bool,
    ):
        """
        Args:
            config: the engine's configuration.
            adapter_key: the key of an adapter's name, see `AdapterRegistry.key`.
            request_error: why a request can't be served, see `Scheduler.request_error`.
            now: the core's clock.
            tokenizes_inline: the loop tokenizes requests.
        """
        self._config = config
        self._adapter_key = adapter_key
        self._request_error = request_error
        self._now = now
        self._tokenizes_inline = tokenizes_inline

    def read(self, data: bytes) -> Arrival | None:
        """The arrival of an encoded ToCore; None if not even its sender can be read."""
        try:
            message = decode_to_core(data)
        except Exception as error:
            return _reject_unreadable(data, error)
        if not isinstance(message, AddRequest):
            return message
        if self._tokenizes_inline or message.unplaced:
            return TextRequest(message, self._now())
        request = self.make_request(message, self._now())
        if isinstance(request, RejectedRequest) and message.mm_inputs:
            request.message = message
        return request

    def make_request(self, message: AddRequest, arrived: float) -> Request | RejectedRequest:
        """The request of a message, under the current key of its adapter."""
        cause = find_value_error(message)
        if cause is not None:
            return RejectedRequest(message.handle, cause)
        key = self._adapter_key(message.adapter)
        if key is None:
            cause = f"no adapter called {message.adapter!r} is served"
            return RejectedRequest(message.handle, cause, FinishReason.NOT_SERVED)
        try:
            request = Request(message, self._config.most_tokens, arrived, key)
            cause = self._request_error(request)
            if cause is None and self._config.enable_prefix_caching:
                request.hash_prompt(self._config.block_size)
        except INTERRUPTS:
            raise
        except BaseException as error:  # any error ends this request only
            return reject(message.handle, error)
        return request if cause is None else RejectedRequest(message.handle, cause)


def reject(handle: int, error: BaseException) -> RejectedRequest:
    """Reject a request that raised an error before it was queued."""
    if isinstance(error, RedlineError):
        return RejectedRequest(handle, str(error))
    log.error("request %d could not be queued", handle, exc_info=error)
    return RejectedRequest(handle, f"the engine could not queue this request: {cause_of(error)}", FinishReason.FAILED)


def find_value_error(message: AddRequest) -> str | None:
    """Why the values of a request can't be served by any engine; None if they can.

    Front ends check what users send. These are the bounds of the columns that hold the values in the core.
    """
    if not 0 <= message.handle < _INT64:
        return f"handle {message.handle} is not a valid handle"
    if len(message.prompt) % 4:
        return f"the prompt has {len(message.prompt)} bytes, which is not a multiple of 4 (int32)"
    if not 1 <= message.max_tokens < _INT64:
        return f"max_tokens is {message.max_tokens}: at least one token must be requested"
    if message.min_tokens < 0:
        return f"min_tokens is {message.min_tokens}, which is negative"
    if not all(0 <= token < 2**31 for token in message.stop_ids):
        return "stop_token_ids: token ids must lie in 0..2³¹ - 1"
    if not 0 <= message.sampling.seed < 2**64:
        return f"seed is {message.sampling.seed}, which isn't an unsigned 64-bit integer"
    return None


def _reject_unreadable(data: bytes, error: Exception) -> RejectedRequest | RejectedCall | None:
    log.error("a message of %d bytes could not be read: %s", len(data), cause_of(error))
    cause = f"the engine could not read this request: {error}"
    match leading_ints(data, 3):
        case [tag, handle, *_] if tag == ADD and 0 <= handle < _INT64:
            return RejectedRequest(handle, cause, FinishReason.FAILED)
        case [tag, front_end, call] if tag == UTILITY and front_end >= 0:
            return RejectedCall(front_end, UtilityResult(call, error=cause))
    return None


def leading_ints(data: bytes, count: int) -> list[int]:
    """The first integers of a MessagePack array, at most `count`, from data that may be cut short or malformed."""
    head = data[:1]
    if head and 0x90 <= head[0] <= 0x9F:
        at = 1
    elif head in (b"\xdc", b"\xdd"):
        at = 3 if head == b"\xdc" else 5
    else:
        return []
    found: list[int] = []
    while len(found) < count and at < len(data):
        size = _INT_SIZES.get(data[at], 1 if data[at] < 0x80 or data[at] >= 0xE0 else 0)
        if not size:
            break
        try:
            found.append(msgspec.msgpack.decode(data[at : at + size], type=int))
        except msgspec.MsgspecError:
            break
        at += size
    return found


# Sizes of MessagePack's uint 8 to 64 and int 8 to 64 by their first byte, which is included.
_INT_SIZES = {0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9, 0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9}
