"""What arrives at a core, made ready off its loop: decoded, checked, and a prompt's blocks hashed.

A message that can't be taken is answered to whoever sent it, as far as that can be read from it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from engine.config import ResolvedConfig
from engine.core.request import Request
from engine.errors import INTERRUPTS, RedlineError, cause_of
from engine.messages import Abort, AddRequest, FinishReason, Shutdown, Utility, UtilityResult, decode_to_core

log = logging.getLogger("redline.core")

ADD, UTILITY = 0, 2  # tags, see engine.messages
_INT64 = 2**63


@dataclass(slots=True)
class TextRequest:
    """A request that the loop has still to tokenize."""

    message: AddRequest
    arrived: float

    @property
    def handle(self) -> int:
        return self.message.handle


@dataclass(slots=True)
class Refused:
    """A request that can't be taken."""

    handle: int
    cause: str
    reason: FinishReason = FinishReason.ERROR


@dataclass(slots=True)
class Unanswerable:
    """A call that can't be read, and the answer to it."""

    front_end: int
    answer: UtilityResult


Arrival = Request | TextRequest | Refused | Unanswerable | Abort | Utility | Shutdown


class Intake:
    """Makes arrivals of encoded messages; `take` is called by one thread, the rest by the loop.

    `key` gives the key of an adapter's name, see `AdapterBook`; `refusal` says why the scheduler can't serve a request.
    With `texts` the loop tokenizes.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        key: Callable[[str], str | None],
        refusal: Callable[[Request], str | None],
        now: Callable[[], float],
        *,
        texts: bool,
    ):
        self._config = config
        self._key = key
        self._refusal = refusal
        self._now = now
        self._texts = texts

    def take(self, data: bytes) -> Arrival | None:
        """What an encoded ToCore asks for; None if nothing can be made of it."""
        try:
            message = decode_to_core(data)
        except Exception as error:
            return _unreadable(data, error)
        if not isinstance(message, AddRequest):
            return message
        if self._texts:
            return TextRequest(message, self._now())
        return self.make(message, self._now())

    def make(self, message: AddRequest, arrived: float) -> Request | Refused:
        """The request of a message, under the key that its adapter's name has now."""
        cause = unfit(message)
        if cause is not None:
            return Refused(message.handle, cause)
        key = self._key(message.adapter)
        if key is None:
            cause = f"no adapter called {message.adapter!r} is served"
            return Refused(message.handle, cause, FinishReason.NOT_SERVED)
        try:
            request = Request(message, self._config.max_model_len, arrived, key)
            cause = self._refusal(request)
            if cause is None and self._config.enable_prefix_caching:
                request.hash_prompt(self._config.block_size)
        except INTERRUPTS:
            raise
        except BaseException as error:  # of this request, whatever it is
            return refused(message.handle, error)
        return request if cause is None else Refused(message.handle, cause)


def refused(handle: int, error: BaseException) -> Refused:
    """The refusal of a request that an error kept from being taken."""
    if isinstance(error, RedlineError):
        return Refused(handle, str(error))
    log.error("request %d could not be taken", handle, exc_info=error)
    return Refused(handle, f"the engine could not take this request: {cause_of(error)}", FinishReason.FAILED)


def unfit(message: AddRequest) -> str | None:
    """Why a request's numbers can't be served by any engine; None if they can.

    Front ends check what users send: these are the bounds of the columns that the core keeps them in.
    """
    if not 0 <= message.handle < _INT64:
        return f"handle {message.handle} is none of a front end's"
    if len(message.prompt) % 4:
        return f"the prompt has {len(message.prompt)} bytes, which are no int32 numbers"
    if not 1 <= message.max_tokens < _INT64:
        return f"max_tokens is {message.max_tokens}: at least one token must be asked for"
    if message.min_tokens < 0:
        return f"min_tokens is {message.min_tokens}, less than none"
    if not all(0 <= token < 2**31 for token in message.stop_ids):
        return "stop_token_ids: token ids are numbers from 0 to 2³¹ - 1"
    if not 0 <= message.sampling.seed < 2**64:
        return f"seed is {message.sampling.seed}, which isn't an unsigned number of 64 bits"
    return None


def _unreadable(data: bytes, error: Exception) -> Refused | Unanswerable | None:
    log.error("a message of %d bytes could not be read: %s", len(data), cause_of(error))
    cause = f"the engine could not read this request: {error}"
    match leading_ints(data, 3):
        case [tag, handle, *_] if tag == ADD and 0 <= handle < _INT64:
            return Refused(handle, cause, FinishReason.FAILED)
        case [tag, front_end, call] if tag == UTILITY and front_end >= 0:
            return Unanswerable(front_end, UtilityResult(call, error=cause))
    return None


def leading_ints(data: bytes, count: int) -> list[int]:
    """The first whole numbers of a MessagePack array, at most `count`, of data that may be cut short or malformed."""
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


# MessagePack's uint 8 to 64 and int 8 to 64, with the byte that names them.
_INT_SIZES = {0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9, 0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9}
