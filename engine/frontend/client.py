"""CoreClient, a front end's side of the core: issues handles, books what comes back, finds stop strings."""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from engine.clock import Clock
from engine.errors import EngineDeadError, RedlineError, RequestError
from engine.frontend.sampling import SEED_MASK, SamplingParams, make_request
from engine.frontend.stats import FrontEndStats
from engine.frontend.streams import REASONS, Output, RequestStream, TokenLogprob
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.transport import Transport
from engine.messages import (
    Abort,
    Dead,
    Finished,
    FinishReason,
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
    ):
        self.ready = ready
        self.tokenizer = tokenizer
        self.clock = clock
        self.stats = FrontEndStats()
        self.dead: str | None = None  # the cause, once the core is gone
        self.on_death: Callable[[str], None] | None = None
        self._transport = transport
        self._front_end = front_end
        self._seed = seed
        self._sequence = 0
        self._live: dict[int, Output] = {}  # by handle
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        """Start to listen; called inside the event loop that will use the client."""
        self._loop = asyncio.get_running_loop()
        self._transport.open(self.deliver)

    def close(self) -> None:
        """Stop to listen; whoever still reads a stream is told so."""
        self.on_death = None
        self.die("the server was stopped before this request was done")
        self._transport.close()

    # ------------------------------------------------------------------------------------------------------- requests

    def add(
        self, prompts: Sequence[list[int]], params: SamplingParams, *, cache_salt: str = "", priority: int = 0
    ) -> RequestStream:
        """Start `params.n` outputs for each prompt (token ids).

        RequestError if a prompt or parameter can't be served, EngineDeadError if nothing can.
        """
        if self.dead is not None:
            raise EngineDeadError(self.dead)
        for prompt in prompts:
            self.check_prompt(prompt)
        params.check_vocabulary(self.ready.vocab_size)
        stream = RequestStream(prompts, params, self, self.clock.now())
        for number, prompt in enumerate(prompts):
            for choice in range(params.n):
                self._sequence += 1
                handle = make_handle(self._front_end, self._sequence)
                output = Output(handle, number * params.n + choice, number, stream, self.tokenizer)
                stream.live[handle] = self._live[handle] = output
                seed = self._draw_seed(params.seed, choice)
                room = self.ready.max_model_len - len(prompt)
                extra = {"cache_salt": cache_salt, "priority": priority}
                self._transport.send(make_request(handle, prompt, params, self.tokenizer, seed, room, **extra))
        return stream

    def check_prompt(self, prompt: list[int]) -> None:
        """Raise RequestError for a prompt that is empty, too long, or holds ids the model doesn't have."""
        limit = self.ready.max_model_len
        if not prompt:
            raise RequestError("the prompt is empty: at least one token is needed", "prompt")
        if len(prompt) >= limit:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, but the model serves at most {limit} (--max-model-len), "
                "of which one is left for the output",
                "prompt",
            )
        if not 0 <= min(prompt) <= max(prompt) < self.ready.vocab_size:
            wrong = min(prompt) if min(prompt) < 0 else max(prompt)
            raise RequestError(f"{wrong} is no token of this model (0..{self.ready.vocab_size - 1})", "prompt")

    def _draw_seed(self, seed: int | None, choice: int) -> int:
        if seed is not None and choice == 0:
            return seed & SEED_MASK
        source = (self._seed, self._front_end, self._sequence) if seed is None else (seed, choice)
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
        self._sequence += 1
        number = self._sequence
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        self._transport.send(Utility(self._front_end, number, method, arguments))
        return await answer

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
        elif isinstance(message, Dead):
            self.die(message.cause)

    def _take(self, message: Outputs) -> None:
        if message.stats is not None:
            self.stats.take_core(message.stats)
        for admitted in message.admitted:
            output = self._live.get(admitted.handle)
            if output is not None:
                output.stream.cached_tokens[output.prompt] = admitted.cached_tokens
                self.stats.queue.observe(admitted.waited_s)
        finished = {one.handle: one for one in message.finished}
        if message.handles:
            self._take_tokens(message, finished)
        for one in finished.values():
            output = self._live.get(one.handle)
            if output is not None:
                self._end(output, one)

    def _take_tokens(self, message: Outputs, finished: dict[int, Finished]) -> None:
        at, now = message.at, self.clock.now()
        live, stats = self._live, self.stats
        tokens = int32s(message.tokens).tolist()
        counts = int32s(message.counts).tolist() if message.counts else None
        logprobs = _LogprobColumns(message.logprobs) if message.logprobs is not None else None
        begin = 0
        for position, handle in enumerate(int64s(message.handles).tolist()):
            end = begin + (1 if counts is None else counts[position])
            output = live.get(handle)
            if output is not None:
                if output.count:
                    stats.itl.observe(at - output.last_at)
                else:
                    output.first_at = at
                    stats.ttft.observe(now - output.stream.arrived)
                output.last_at = at
                ending = finished.get(handle) if finished else None
                for index in range(begin, end):
                    is_stop = ending is not None and ending.stop_id >= 0 and index == end - 1
                    logprob = logprobs.of(index, output.top) if logprobs is not None else None
                    if self._add_token(output, tokens[index], logprob, is_stop):
                        break
            begin = end

    def _add_token(self, output: Output, token: int, logprob: TokenLogprob | None, is_stop: bool) -> bool:
        """Add one token to an output; True if that completed a stop string, which ends it here."""
        if is_stop and not output.include_stop:
            output.add(token, "", logprob)
            return False
        text, stop = output.detokenizer.push(token)
        output.add(token, text, logprob)
        if stop is None:
            return False
        self._transport.send(Abort((output.handle,)))
        output.finish("stop", stop, "")
        self._drop(output, "stop")
        return True

    def _end(self, output: Output, finished: Finished) -> None:
        """The core ended an output."""
        reason = REASONS[FinishReason(finished.reason)]
        if finished.reason == FinishReason.ERROR:
            output.stream.fail(RequestError(finished.error or "the engine could not serve this request"))
            self._drop(output, reason)
            self.abort(output.stream)
            return
        stop = finished.stop_id if finished.stop_id in output.user_stop_ids else None
        output.finish(reason, stop, output.detokenizer.finish())
        self._drop(output, reason)

    def _drop(self, output: Output, reason: str) -> None:
        """Forget an output that is over, and count it."""
        del self._live[output.handle]
        del output.stream.live[output.handle]
        stats = self.stats
        stats.finished[reason] += 1
        if reason in ("stop", "length"):
            stats.e2e.observe(self.clock.now() - output.stream.arrived)
            stats.prompt_tokens.observe(len(output.stream.prompts[output.prompt]))
            stats.generation_tokens.observe(output.count)

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
        for stream in {id(output.stream): output.stream for output in self._live.values()}.values():
            stream.fail(error)
        for output in list(self._live.values()):
            self._drop(output, "error")
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(error)
        self._calls.clear()
        if self.on_death is not None:
            self.on_death(cause)

    def die_threadsafe(self, cause: str) -> None:
        """`die`, from any thread; for `CoreProcess.watch`."""
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
