"""CoreClient, a front end's side of the core: issues handles, books what comes back, finds stop strings."""

import asyncio
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from engine.clock import Clock
from engine.errors import EngineDeadError, RedlineError, RequestError
from engine.frontend.logs import Ended
from engine.frontend.prompts import Prompt, check_prompt, length_of
from engine.frontend.sampling import SEED_MASK, SamplingParams, make_request
from engine.frontend.stats import Board, FrontEndStats
from engine.frontend.streams import REASONS, Origin, Output, RequestStream, Terms, TokenLogprob
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.transport import Transport
from engine.messages import (
    Abort,
    Dead,
    Finished,
    FinishReason,
    Hung,
    Outputs,
    Ready,
    TokenLogprobs,
    Utility,
    UtilityResult,
    decode_from_core,
    float32s,
    int32s,
    int64s,
    make_handle,
)

NOBODY = Origin()
STOPPED = "the server was stopped before this request was done"


class CoreClient:
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
        self.ready = ready
        self.tokenizer = tokenizer
        self.clock = clock
        self.board = board
        self.stats = FrontEndStats() if board is None else board.stats[front_end]
        self.dead: str | None = None  # the cause, once the core is gone
        self.hung = ""  # the cause, while a step takes longer than it may
        self.on_death: Callable[[str], None] | None = None
        self.on_ended: Callable[[Ended], None] | None = None
        self.touched: list[RequestStream] = []  # by the message that is being booked
        self._transport = transport
        self._front_end = front_end
        self._seed = seed
        self._numbers = itertools.count(1) if numbers is None else numbers
        self._live: dict[int, Output] = {}  # by handle
        self._ended: dict[int, Ended] = {}  # ended here; the core's last word is still to come
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
        for prompt in prompts:
            if isinstance(prompt, list):
                self.check_prompt(prompt)
            else:
                assert self.ready.inline, "this core takes no texts"
        params.check_vocabulary(self.ready.vocab_size)

    def submit(self, stream: RequestStream) -> None:
        """Send a stream's outputs to the core, as checked by `check`."""
        inline, params, terms = self.ready.inline, stream.params, stream.terms
        stream.client = self
        tokenizer = None if inline else self.tokenizer
        extra: dict[str, Any] = {
            "inline": inline, "cache_salt": terms.cache_salt, "priority": terms.priority, "adapter": terms.adapter
        }  # fmt: skip
        for number, prompt in enumerate(stream.prompts):
            for choice in range(params.n):
                sequence = next(self._numbers)
                handle = make_handle(self._front_end, sequence)
                output = Output(handle, number * params.n + choice, number, stream, tokenizer)
                stream.live[handle] = self._live[handle] = output
                seed = self._draw_seed(params.seed, choice, sequence)
                room = self.ready.max_model_len - length_of(prompt)
                self._transport.send(make_request(handle, prompt, params, self.tokenizer, seed, room, **extra))
        self.stats.live = len(self._live)

    def check_prompt(self, prompt: list[int]) -> None:
        """Raise RequestError for a prompt that is empty, too long, or holds ids the model doesn't have."""
        check_prompt(prompt, self.ready.max_model_len, self.ready.vocab_size)

    def _draw_seed(self, seed: int | None, choice: int, sequence: int) -> int:
        if seed is not None and choice == 0:
            return seed & SEED_MASK
        source = (self._seed, self._front_end, sequence) if seed is None else (seed, choice)
        return int.from_bytes(hashlib.blake2b(repr(source).encode(), digest_size=8).digest(), "little")

    def abort(self, stream: RequestStream) -> None:
        """End all outputs of a stream that still run; its reader gets no more of them."""
        handles = tuple(stream.live)
        for handle in handles:
            self._drop(stream.live[handle], "abort")
        stream.wake()
        if handles and self.dead is None:
            self._transport.send(Abort(handles))

    async def call(self, method: str, **arguments: Any) -> Any:
        """Call a utility of the core by name; RedlineError with its own words if it fails."""
        if self.dead is not None:
            raise EngineDeadError(self.dead)
        number = next(self._numbers)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        self._transport.send(Utility(self._front_end, number, method, arguments))
        return await answer

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
        """Take an encoded FromCore."""
        message = decode_from_core(data)
        if isinstance(message, Outputs):
            self._take(message)
        elif isinstance(message, UtilityResult):
            self._answer(message)
        elif isinstance(message, Hung):
            self.hung = message.cause
        elif isinstance(message, Dead):
            self.die(message.cause)

    def _take(self, message: Outputs) -> None:
        if message.stats is not None:
            self.stats.take_core(message.at, message.stats)
        for admitted in message.admitted:
            output = self._live.get(admitted.handle)
            if output is not None:
                output.cached_tokens = output.stream.cached_tokens[output.prompt] = admitted.cached_tokens
                output.waited_s = max(0.0, admitted.waited_s)
                if admitted.prompt_tokens:
                    output.stream.prompt_lengths[output.prompt] = admitted.prompt_tokens
                self.stats.queue.observe(output.waited_s)
        finished = {one.handle: one for one in message.finished}
        if message.handles:
            self._take_tokens(message, finished)
        for one in finished.values():
            output = self._live.get(one.handle)
            if output is not None:
                self._end(output, one)
            elif (ended := self._ended.pop(one.handle, None)) is not None:
                ended.preemptions = one.preemptions
                self._tell(ended)
        for stream in self.touched:
            stream.flush()
        self.touched.clear()

    def _take_tokens(self, message: Outputs, finished: dict[int, Finished]) -> None:
        at, now = message.at, self.clock.now()
        live, stats, texts = self._live, self.stats, message.texts
        tokens = int32s(message.tokens).tolist()
        counts = int32s(message.counts).tolist() if message.counts else None
        logprobs = _LogprobColumns(message.logprobs) if message.logprobs is not None else None
        begin = 0
        for position, handle in enumerate(int64s(message.handles).tolist()):
            end = begin + (1 if counts is None else counts[position])
            output = live.get(handle)
            if output is not None and end > begin:
                if output.count:
                    stats.itl.observe(at - output.last_at)
                else:
                    output.first_at = at
                    output.ttft_s = now - output.stream.arrived
                    stats.ttft.observe(output.ttft_s)
                output.last_at = at
                ending = finished.get(handle) if finished else None
                for index in range(begin, end):
                    logprob = logprobs.of(index, output.top) if logprobs is not None else None
                    if texts is not None:
                        output.add(tokens[index], texts[position] if index == begin else "", logprob)
                        continue
                    is_stop = ending is not None and ending.stop_id >= 0 and index == end - 1
                    if self._add_token(output, tokens[index], logprob, is_stop):
                        if ending is None:  # else the core has ended it by itself
                            self._transport.send(Abort((handle,)))
                        break
            begin = end

    def _add_token(self, output: Output, token: int, logprob: TokenLogprob | None, is_stop: bool) -> bool:
        """Add one token to an output; True if that completed a stop string, which ends it here."""
        if is_stop and not output.include_stop:
            output.add(token, "", logprob)
            return False
        assert output.detokenizer is not None, "the core writes the texts of this request"
        text, stop = output.detokenizer.push(token)
        output.add(token, text, logprob)
        if stop is None:
            return False
        output.finish("stop", stop, "")
        self._drop(output, "stop")
        return True

    def _end(self, output: Output, finished: Finished) -> None:
        """The core ended an output."""
        reason = REASONS[FinishReason(finished.reason)]
        if finished.reason == FinishReason.ERROR:
            output.stream.fail(RequestError(finished.error or "the engine could not serve this request"))
            self._drop(output, reason, finished)
            self.abort(output.stream)
            return
        stop: int | str | None = finished.stop or None
        if finished.stop_id in output.user_stop_ids:
            stop = finished.stop_id
        output.finish(reason, stop, finished.text if output.detokenizer is None else output.detokenizer.finish())
        self._drop(output, reason, finished)

    def _drop(self, output: Output, reason: str, finished: Finished | None = None) -> None:
        """Forget an output that is over, and count it; `finished` is the core's word, if that came first."""
        del self._live[output.handle]
        del output.stream.live[output.handle]
        stats, now = self.stats, self.clock.now()
        stats.live = len(self._live)
        stats.count_finished(reason)
        if reason in ("stop", "length"):
            stats.e2e.observe(now - output.stream.arrived)
            stats.prompt_tokens.observe(output.stream.prompt_lengths[output.prompt])
            stats.generation_tokens.observe(output.count)
        if self.on_ended is None:
            return
        ended = Ended.of(output, reason, now, self._front_end)
        if finished is not None:
            ended.preemptions, ended.error = finished.preemptions, finished.error or None
            self._tell(ended)
        elif self.dead is not None:
            ended.error = self.dead
            self._tell(ended)
        else:
            self._ended[output.handle] = ended

    def _tell(self, ended: Ended) -> None:
        if self.on_ended is not None:
            self.on_ended(ended)

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


class _LogprobColumns:
    """The logprobs of one message, by the position of their token."""

    def __init__(self, columns: TokenLogprobs):
        self._ids = int32s(columns.ids).reshape(-1, columns.width).tolist()
        self._values = float32s(columns.values).reshape(-1, columns.width).tolist()
        self._ranks = int32s(columns.ranks).tolist()
        self._entry = {position: entry for entry, position in enumerate(int32s(columns.index).tolist())}

    def of(self, position: int, top: int | None) -> TokenLogprob | None:
        entry = self._entry.get(position)
        if entry is None or top is None:
            return None
        ids, values = self._ids[entry], self._values[entry]
        alternatives = tuple(zip(ids[1 : top + 1], values[1 : top + 1], strict=True))
        return TokenLogprob(ids[0], values[0], self._ranks[entry], alternatives)
