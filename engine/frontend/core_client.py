"""CoreClient, a front end's connection to one core: sends requests and processes the outputs that come back."""

import asyncio
import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from msgspec.structs import asdict, replace

from engine.clock import Clock
from engine.errors import EngineDeadError, RedlineError, RequestError
from engine.frontend.feature_cache import PromptInputs, placed_inputs, unplaced_inputs
from engine.frontend.front_end_stats import Board, FrontEndStats
from engine.frontend.listener import ClientListener
from engine.frontend.mm_pipeline import MMPipeline
from engine.frontend.output_processor import OutputProcessor
from engine.frontend.prompts import Prompt, length_of
from engine.frontend.request_checks import check_fields, check_ids
from engine.frontend.sampling_params import SEED_MASK, SamplingParams, make_request
from engine.frontend.simulated import refused_grammar, with_stop_ids
from engine.frontend.streams import Origin, Output, RequestOptions, RequestStream
from engine.frontend.token_filters import bad_word_ids
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.transport import Transport
from engine.frontend.vectors import make_pooling_request
from engine.grammar import Grammar, GrammarCheck
from engine.messages import (
    Abort,
    AddRequest,
    Dead,
    Hung,
    MMInputRef,
    Outputs,
    Ready,
    Utility,
    UtilityResult,
    decode_from_core,
    make_handle,
)

log = logging.getLogger("redline.client")

NO_OPTIONS, UNKNOWN_ORIGIN = RequestOptions(), Origin()
STOPPED = "the server was stopped before this request finished"
# Errors of msgspec. UnicodeEncodeError, for a lone surrogate, is a ValueError.
UNENCODABLE = (OverflowError, TypeError, ValueError)


class CoreClient(OutputProcessor):
    """One front end of one core; lives in one event loop. Other threads may only call `core_lost_threadsafe`."""

    # Of several cores, see `Router`.
    replicas: tuple["CoreClient", ...] = ()
    routing = ""
    unavailable = ""

    def __init__(  # noqa: PLR0913  (most are keywords with defaults)
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
        replica: int | None = None,
        inputs: MMPipeline | None = None,
    ):
        """Make a client; `open` starts it.

        Args:
            ready: what the core reported at its start.
            tokenizer: of the model.
            transport: carries messages to and from the core.
            clock: of the arrival and latency of requests.
            front_end: number of this front end among those of the core; part of the handles.
            seed: from which the seeds of requests without one are drawn.
            board: where all front ends of the core keep their stats; None: this one is the only front end.
            numbers: sequence numbers of the requests, 1, 2, 3, … by default. Clients of several cores share them.
            replica: number of the core among several; None: there is one core.
            inputs: prepares multimodal inputs, if the model takes any. Clients of several cores share it.
        """
        stats = FrontEndStats() if board is None else board.stats[front_end]
        super().__init__(transport, clock, stats, front_end, replica or 0)
        self.name = "" if replica is None else f"replica {replica}"
        self.ready = ready
        self.tokenizer = tokenizer
        self.board = board
        self.hung = ""  # the cause, while a step exceeds --step-timeout
        self._seed = seed
        self._numbers = itertools.count(1) if numbers is None else numbers
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = False
        self.inputs = inputs
        if inputs is not None:
            assert ready.mm is not None, "the model takes no multimodal inputs"
            self.features = inputs.cache
            self.features.attach(self.replica, ready.mm.folder, transport)

    def open(self, listener: ClientListener | None = None) -> None:
        """Start receiving messages; called inside the event loop that will use the client."""
        if listener is not None:
            self.listener = listener
        self._loop = asyncio.get_running_loop()
        self._transport.open(self.deliver)
        if self.inputs is not None:
            self.inputs.open()

    def close(self) -> None:
        """Stop receiving messages. Streams that are still live fail; `core_died` is not called."""
        self._closing = True
        self.fail_all(STOPPED)
        self._transport.close()
        if self.inputs is not None:
            self.inputs.close()

    # ------------------------------------------------------------------------------------------------------- requests

    def add_request(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        options: RequestOptions = NO_OPTIONS,
        origin: Origin = UNKNOWN_ORIGIN,
        inputs: Sequence[PromptInputs] = (),
        second_segments: Sequence[int] = (),
    ) -> RequestStream:
        """Start `params.n` outputs for each prompt. Prompts are token ids, or texts if the core tokenizes.

        `inputs` are the multimodal inputs of each prompt, in order; they are released with the last output. If this
        raises, they are the caller's. `second_segments`: of a model that pools pairs of texts, see AddRequest.

        Raises:
            RequestError: a prompt or a parameter can't be served.
            EngineDeadError: the core is gone.
        """
        if self.dead is not None:
            raise EngineDeadError(self.dead)
        self.check_fields(prompts, params, options.priority)
        assert len(inputs) in (0, len(prompts)), "inputs are given for all prompts or for none"
        stream = RequestStream(prompts, params, self, self.clock.now(), origin, options, inputs, second_segments)
        self.submit(stream)
        return stream

    def check_fields(self, prompts: Sequence[Prompt], params: SamplingParams, priority: int) -> None:
        """Raise RequestError for a request that can't be served."""
        check_fields(self.ready, prompts, params, priority)

    def submit(self, stream: RequestStream) -> None:
        """Send a stream's outputs to the core, all or none; `check_fields` has accepted them.

        Raises RequestError if a value can't be encoded.
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
        sequence = next(self._numbers)
        handle = make_handle(self._front_end, sequence)
        has_texts = not (self.ready.inline or self.ready.pooling)
        tokenizer = self.tokenizer if has_texts else None
        output = Output(handle, number * stream.params.n + choice, number, stream, tokenizer)
        stream.live[handle] = self._live[handle] = output
        if self.ready.pooling is None:
            message = self._message(stream, number, choice, sequence, bad_words)
        else:
            prompt, segments = stream.prompts[number], stream.second_segments
            assert isinstance(prompt, list), "a text was not tokenized"
            message = make_pooling_request(handle, prompt, segments[number] if segments else 0, stream.options)
        try:
            self._transport.send(message)
        except UNENCODABLE as error:
            if self.features is not None:
                self.features.withdraw(self.replica, message.mm_inputs)
            raise RequestError(f"the request has a value that can't be sent to the engine: {error}") from error
        return handle

    def _message(
        self, stream: RequestStream, number: int, choice: int, sequence: int, bad_words: tuple[tuple[int, ...], ...]
    ) -> AddRequest:
        """The message of one output of a prompt that is continued."""
        params, prompt = stream.params, stream.prompts[number]
        message = make_request(
            make_handle(self._front_end, sequence),
            prompt,
            params,
            self.tokenizer,
            self._draw_seed(params.seed, choice, sequence),
            self.ready.max_model_len - length_of(prompt),
            bad_words=bad_words,
            inline=self.ready.inline,
            **asdict(stream.options),
        )
        if self.ready.simulated:
            message = with_stop_ids(message)
        return self._with_inputs(message, stream.inputs[number]) if stream.inputs else message

    def _with_inputs(self, message: AddRequest, inputs: PromptInputs) -> AddRequest:
        """The message with the multimodal inputs of its prompt, to be sent before anything else runs."""
        placed, refs = placed_inputs(inputs), tuple[MMInputRef, ...]()
        if placed:
            assert self.features is not None, "the model takes no multimodal inputs"
            refs = self.features.refs_for(self.replica, message.handle, placed)
        return replace(message, mm_inputs=refs, unplaced=unplaced_inputs(inputs))

    def check_prompt(self, prompt: list[int]) -> None:
        """Raise RequestError for a prompt that is empty, too long, or holds ids outside the vocabulary."""
        check_ids(self.ready, prompt)

    def _draw_seed(self, seed: int | None, choice: int, sequence: int) -> int:
        if seed is not None and choice == 0:
            return seed & SEED_MASK
        source = (self._seed, self._front_end, sequence) if seed is None else (seed, choice)
        return int.from_bytes(hashlib.blake2b(repr(source).encode(), digest_size=8).digest(), "little")

    async def call_utility(self, method: str, **arguments: Any) -> Any:
        """Call a utility of the core by name; returns its result. Raises RedlineError with the core's message."""
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
            self._calls.pop(number, None)  # also if the caller was canceled

    async def check_grammar(self, grammar: Grammar) -> str:
        """Compile a grammar in the core; returns why it can't be used, or an empty text."""
        if refused := refused_grammar(self.ready):
            return refused
        answer = await self.call_utility("check_grammar", kind=grammar.kind, text=grammar.text)
        check = msgspec.convert(answer, GrammarCheck)
        self.stats.count_grammar([check.compile_s])
        return check.cause

    @property
    def alone(self) -> bool:
        """Whether this is the core's only front end."""
        return self.board is None or len(self.board.stats) == 1

    @property
    def total_stats(self) -> FrontEndStats:
        """The stats of all front ends of the core together, now."""
        return self.stats if self.board is None or self.alone else self.board.total()

    @property
    def serving(self) -> list["CoreClient"]:
        """The clients of the cores that take requests, see `Router`."""
        return [self] if self.dead is None else []

    def replica_states(self) -> list[dict[str, Any]]:
        """The states of several replicas, see `Router`."""
        return []

    @property
    def num_live(self) -> int:
        """Outputs that the core has still to end."""
        return len(self._live)

    def health(self) -> dict[str, Any]:
        """The state of the replica: its number, process, status (ok, hung or dead), cause, and load."""
        state: dict[str, Any] = {"replica": self.replica, "process": self.ready.process_id}
        if self.dead is not None:
            return state | {"status": "dead", "cause": self.dead, "running": 0, "waiting": 0}
        core = self.total_stats.core
        status = {"status": "hung", "cause": self.hung} if self.hung else {"status": "ok"}
        return state | status | {"running": core.running, "waiting": core.waiting}

    def release(self, stream: RequestStream) -> list[int]:
        """Give up a stream that another replica takes over; returns the handles of its outputs."""
        handles = list(stream.live)
        for handle in handles:
            del self._live[handle], stream.live[handle]
        self.stats.live = len(self._live)
        if handles and self.dead is None:
            self._transport.send(Abort(tuple(handles)))
        return handles

    # ----------------------------------------------------------------------------------------------- from the core

    def deliver(self, data: bytes) -> None:
        """Process an encoded FromCore message."""
        try:
            message = decode_from_core(data)
        except Exception as error:  # the requests that it concerned are unknown
            log.exception("a message of the EngineCore could not be read")
            self._fail_everything(RedlineError(f"a message of the EngineCore could not be read: {error}"))
            return
        if isinstance(message, Outputs):
            self._process(message)
        elif isinstance(message, UtilityResult):
            self._complete_call(message)
        elif isinstance(message, Hung):
            self.hung = message.cause
        elif isinstance(message, Dead):
            self.core_lost(self.replica, message.cause)

    def _fail_everything(self, error: RedlineError) -> None:
        """Fail all streams and calls, since the message may have been about any of them; clients may retry."""
        for stream in self.streams():
            self._fail_stream(stream, error)
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(error)

    def _complete_call(self, message: UtilityResult) -> None:
        answer = self._calls.pop(message.call, None)
        if answer is None or answer.done():
            return
        if message.error:
            answer.set_exception(RedlineError(message.error))
        else:
            answer.set_result(message.result)

    # -------------------------------------------------------------------------------------------------------- the end

    def fail_all(self, cause: str) -> None:
        """Fail all streams and calls, now and later, with the cause."""
        if self.dead is not None:
            return
        self.dead = cause
        if self.features is not None:
            self.features.detach(self.replica)
        if not self._closing:
            self.listener.core_died(cause)
        error = EngineDeadError(cause)
        for stream in self.streams():
            stream.fail(error)
        for output in list(self._live.values()):
            self._remove(output, "error")
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(error)
        self._calls.clear()
        for record, _ in self._unreported.values():
            self._report(record)
        self._unreported.clear()

    def core_lost(self, replica: int, cause: str) -> None:  # noqa: ARG002  (as of a Router)
        """The core is gone: `fail_all`, with the replica's name in the cause."""
        self.fail_all(f"{self.name}: {cause}" if self.name else cause)

    def core_up(self, replica: int, ready: Ready, transport: Transport) -> None:  # noqa: ARG002  (as of a Router)
        """A new core has replaced the lost one: serve again. `ready` is its report, `transport` reaches it."""
        self._transport.close()
        self._transport = transport
        self.ready = ready
        self.dead, self.hung = None, ""
        self.stats.core_replaced()
        if self.features is not None:
            assert ready.mm is not None, "the model takes no multimodal inputs"
            self.features.attach(self.replica, ready.mm.folder, transport)
        transport.open(self.deliver)

    def core_removed(self) -> None:
        """The core was stopped: it has no streams, and its counters are kept."""
        self.fail_all(f"{self.name} was removed")
        self._transport.close()

    def core_lost_threadsafe(self, replica: int, cause: str) -> None:
        """`core_lost`, from any thread; for `Engine.watch`."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.core_lost, replica, cause)
