"""CoreClient, a front end's side of the core: issues handles, books what comes back, finds stop strings."""

import asyncio
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from engine.clock import Clock
from engine.errors import EngineDeadError, RedlineError, RequestError
from engine.frontend.booking import Booking
from engine.frontend.prompts import Prompt, check_prompt, length_of
from engine.frontend.sampling import SEED_MASK, SamplingParams, make_request
from engine.frontend.stats import Board, FrontEndStats
from engine.frontend.streams import Origin, Output, RequestStream, Terms
from engine.frontend.token_filters import bad_word_ids
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.transport import Transport
from engine.messages import (
    Abort,
    Dead,
    Hung,
    Outputs,
    Ready,
    Utility,
    UtilityResult,
    decode_from_core,
    make_handle,
)

log = logging.getLogger("redline.client")

NOBODY = Origin()
STOPPED = "the server was stopped before this request was done"
PRIORITIES = range(-(2**63), 2**63)
UNENCODABLE = (OverflowError, TypeError, ValueError)  # of msgspec; UnicodeEncodeError for half a character among them


class CoreClient(Booking):
    """One front end of one core; lives in one event loop, and only `die_threadsafe` may be called from elsewhere."""

    def __init__(
        self,
        ready: Ready,
        tokenizer: Tokenizer,
        transport: Transport,
        clock: Clock,
        *,
        front_end: int = 0,
        seed: int = 0,
        board: Board | None = None,
        numbers: Iterator[int] | None = None,
    ):
        """`front_end` is its number, as in the handles; `board` is where all front ends of the core count.

        `numbers` number its requests, 1, 2, 3, … unless given: clients of several cores may share them.
        """
        stats = FrontEndStats() if board is None else board.stats[front_end]
        super().__init__(transport, clock, stats, front_end)
        self.ready = ready
        self.tokenizer = tokenizer
        self.board = board
        self.hung = ""  # the cause, while a step takes longer than it may
        self.on_death: Callable[[str], None] | None = None
        self._seed = seed
        self._numbers = itertools.count(1) if numbers is None else numbers
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        """Start to listen; called inside the event loop that will use the client."""
        self._loop = asyncio.get_running_loop()
        self._transport.open(self.deliver)

    def close(self) -> None:
        """Stop to listen; whoever still reads a stream is told so."""
        self.on_death = None
        self.die(STOPPED)
        self._transport.close()

    # ------------------------------------------------------------------------------------------------------- requests

    def add(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        cache_salt: str = "",
        priority: int = 0,
        origin: Origin = NOBODY,
        adapter: str = "",
    ) -> RequestStream:
        """Start `params.n` outputs for each prompt: token ids, or texts where the core is inline.

        RequestError if a prompt or parameter can't be served, EngineDeadError if nothing can.
        """
        self.check(prompts, params, priority)
        terms = Terms(cache_salt, priority, adapter)
        stream = RequestStream(prompts, params, self, self.clock.now(), origin, terms)
        self.submit(stream)
        return stream

    def check(self, prompts: Sequence[Prompt], params: SamplingParams, priority: int) -> None:
        """Raise RequestError for a request that can't be served, EngineDeadError if none can."""
        if self.dead is not None:
            raise EngineDeadError(self.dead)
        if priority and self.ready.scheduling_policy != "priority":
            raise RequestError(
                f"priority is {priority}, but this server takes requests in the order they come: "
                "start it with --scheduling-policy priority",
                "priority",
            )
        if priority not in PRIORITIES:
            raise RequestError(f"priority must be a whole number of 64 bits, not {priority}", "priority")
        for prompt in prompts:
            if isinstance(prompt, list):
                self.check_prompt(prompt)
            else:
                assert self.ready.inline, "this core takes no texts"
        params.check_vocabulary(self.ready.vocab_size)

    def submit(self, stream: RequestStream) -> None:
        """Send a stream's outputs to the core, as checked by `check`.

        If that fails nothing of it stays here or there; RequestError for a value that can't be sent.
        """
        stream.client = self
        sent: list[int] = []
        bad_words = bad_word_ids(stream.params.bad_words or (), self.tokenizer, self.ready.vocab_size)
        try:
            for number in range(len(stream.prompts)):
                for choice in range(stream.params.n):
                    sent.append(self._submit_one(stream, number, choice, bad_words))
        except BaseException:
            for handle in list(stream.live):
                del stream.live[handle], self._live[handle]
            if sent:
                self._transport.send(Abort(tuple(sent)))
            raise
        finally:
            self.stats.live = len(self._live)

    def _submit_one(
        self, stream: RequestStream, number: int, choice: int, bad_words: tuple[tuple[int, ...], ...]
    ) -> int:
        """Send one output of a prompt; returns its handle."""
        inline, params, terms, prompt = self.ready.inline, stream.params, stream.terms, stream.prompts[number]
        sequence = next(self._numbers)
        handle = make_handle(self._front_end, sequence)
        output = Output(handle, number * params.n + choice, number, stream, None if inline else self.tokenizer)
        stream.live[handle] = self._live[handle] = output
        seed = self._draw_seed(params.seed, choice, sequence)
        room = self.ready.max_model_len - length_of(prompt)
        message = make_request(
            handle, prompt, params, self.tokenizer, seed, room, inline=inline, cache_salt=terms.cache_salt,
            priority=terms.priority, adapter=terms.adapter, bad_words=bad_words,
        )  # fmt: skip
        try:
            self._transport.send(message)
        except UNENCODABLE as error:
            raise RequestError(f"the request holds a value that can't be sent to the engine: {error}") from error
        return handle

    def check_prompt(self, prompt: list[int]) -> None:
        """Raise RequestError for a prompt that is empty, too long, or holds ids the model doesn't have."""
        check_prompt(prompt, self.ready.max_model_len, self.ready.vocab_size)

    def _draw_seed(self, seed: int | None, choice: int, sequence: int) -> int:
        if seed is not None and choice == 0:
            return seed & SEED_MASK
        source = (self._seed, self._front_end, sequence) if seed is None else (seed, choice)
        return int.from_bytes(hashlib.blake2b(repr(source).encode(), digest_size=8).digest(), "little")

    async def call(self, method: str, **arguments: Any) -> Any:
        """Call a utility of the core by name; RedlineError with its own words if it fails."""
        if self.dead is not None:
            raise EngineDeadError(self.dead)
        number = next(self._numbers)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        try:
            self._transport.send(Utility(self._front_end, number, method, arguments))
        except UNENCODABLE as error:
            del self._calls[number]
            raise RequestError(f"{method}: an argument can't be sent to the engine: {error}") from error
        try:
            return await answer
        finally:
            self._calls.pop(number, None)  # also where the caller waits no longer

    @property
    def alone(self) -> bool:
        """Whether this is the core's only front end."""
        return self.board is None or len(self.board.stats) == 1

    @property
    def total_stats(self) -> FrontEndStats:
        """The stats of all front ends of the core together, now."""
        return self.stats if self.board is None or self.alone else self.board.total()

    def live_count(self) -> int:
        return len(self._live)

    # ----------------------------------------------------------------------------------------------- from the core

    def deliver(self, data: bytes) -> None:
        """Take an encoded FromCore; a failure over one request is that request's."""
        try:
            message = decode_from_core(data)
        except Exception as error:  # whose it was can't be known
            log.exception("a message of the EngineCore could not be read")
            self._lose(RedlineError(f"a message of the EngineCore could not be read: {error}"))
            return
        if isinstance(message, Outputs):
            self._take(message)
        elif isinstance(message, UtilityResult):
            self._answer(message)
        elif isinstance(message, Hung):
            self.hung = message.cause
        elif isinstance(message, Dead):
            self.die(message.cause)

    def _lose(self, error: RedlineError) -> None:
        """Nobody knows whom a message concerned: all that waits for one fails, and may try again."""
        for stream in {id(output.stream): output.stream for output in self._live.values()}.values():
            self._fail_stream(stream, error)
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(error)

    def _answer(self, message: UtilityResult) -> None:
        answer = self._calls.pop(message.call, None)
        if answer is None or answer.done():
            return
        if message.error:
            answer.set_exception(RedlineError(message.error))
        else:
            answer.set_result(message.result)

    # -------------------------------------------------------------------------------------------------------- the end

    def die(self, cause: str) -> None:
        """The core is gone: every reader and caller gets the cause, and so does whoever asks from now on."""
        if self.dead is not None:
            return
        self.dead = cause
        error = EngineDeadError(cause)
        self._fail_all(error)
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(error)
        self._calls.clear()
        for ended in self._ended.values():
            self._tell(ended)
        self._ended.clear()
        if self.on_death is not None:
            self.on_death(cause)

    def _fail_all(self, error: EngineDeadError) -> None:
        for stream in {id(output.stream): output.stream for output in self._live.values()}.values():
            stream.fail(error)
        for output in list(self._live.values()):
            self._drop(output, "error")

    def lose(self, _replica: int, cause: str) -> None:
        """`die`: the only replica is gone."""
        self.die(cause)

    def lose_threadsafe(self, _replica: int, cause: str) -> None:
        """`die`, from any thread: the only replica is gone; for `Engine.watch`."""
        self.die_threadsafe(cause)

    def die_threadsafe(self, cause: str) -> None:
        """`die`, from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.die, cause)
