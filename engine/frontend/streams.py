"""What one call of a user gets back: outputs that arrive in deltas, merged for a reader that is slow."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from engine.errors import RequestError
from engine.frontend.detokenizer import Detokenizer
from engine.frontend.prompts import Prompt, length_of
from engine.frontend.sampling import SamplingParams
from engine.messages import FinishReason

if TYPE_CHECKING:
    from engine.frontend.tokenizer import Tokenizer

REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
    FinishReason.ERROR: "error",
    FinishReason.FAILED: "error",
    FinishReason.NOT_SERVED: "error",
    FinishReason.SHUT_DOWN: "error",
}


class TokenLogprob(msgspec.Struct, frozen=True, gc=False):
    """The logprob of a sampled token, its rank (1 is the likeliest), and the likeliest (id, logprob) in order."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class Delta(msgspec.Struct, gc=False):
    """What is new of one output since it was last read."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Origin(msgspec.Struct, frozen=True):
    """Whose request it is, for the log."""

    request: str = ""  # the id its client was given
    model: str = ""
    client: str = ""  # address


class Terms(msgspec.Struct, frozen=True):
    """What a request asks of the core beside its sampling."""

    cache_salt: str = ""
    priority: int = 0
    adapter: str = ""

    def __post_init__(self) -> None:
        for field in ("cache_salt", "adapter"):
            try:
                getattr(self, field).encode()
            except UnicodeEncodeError as error:
                raise RequestError(f"{field} holds half a character: {error.reason}", field) from None


NO_TERMS = Terms()


class Client(Protocol):
    """A stream's side of the CoreClient."""

    touched: list["RequestStream"]  # have something new; flushed when the core's message is booked

    def abort(self, stream: "RequestStream") -> None: ...


class Output:
    """One output under way: the front end's side of a request of the core."""

    __slots__ = (
        "cached_tokens",
        "count",
        "delta",
        "detokenizer",
        "first_at",
        "handle",
        "include_stop",
        "index",
        "last_at",
        "prompt",
        "prompt_logprobs",
        "stream",
        "top",
        "ttft_s",
        "user_stop_ids",
        "waited_s",
    )

    def __init__(self, handle: int, index: int, prompt: int, stream: "RequestStream", tokenizer: "Tokenizer | None"):
        """Without a tokenizer the core writes the texts."""
        params = stream.params
        self.handle = handle
        self.index = index
        self.prompt = prompt  # which of the stream's prompts
        self.stream = stream
        self.count = 0
        self.first_at = self.last_at = 0.0
        self.waited_s = self.ttft_s = 0.0
        self.cached_tokens = 0
        self.delta: Delta | None = None
        self.include_stop = params.include_stop_str_in_output
        self.top = params.logprobs  # so many alternatives a token; None: no logprobs
        self.prompt_logprobs: list[TokenLogprob | None] = [None]  # the first token has none
        if params.prompt_logprobs is not None:
            stream.prompt_logprobs[index] = self.prompt_logprobs
        self.user_stop_ids = frozenset(params.stop_token_ids or ())
        self.detokenizer = None
        if tokenizer is not None:
            given = stream.prompts[prompt]
            assert isinstance(given, list), "a text was not tokenised"
            self.detokenizer = Detokenizer(
                tokenizer,
                given,
                stop=params.stops,
                include_stop=self.include_stop,
                skip_special_tokens=params.skip_special_tokens,
                min_tokens=params.min_tokens,
            )

    def add(self, token: int, text: str, logprob: TokenLogprob | None) -> None:
        """Put a token into the slot that the reader empties."""
        self.count += 1
        delta = self.delta
        if delta is None:
            delta = self.delta = Delta(self.index, text, [token])
            self.stream.offer(self)
        else:
            delta.text += text
            delta.token_ids.append(token)
        if logprob is not None:
            if delta.logprobs is None:
                delta.logprobs = []
            delta.logprobs.append(logprob)

    def finish(self, reason: str, stop_reason: int | str | None, text: str) -> None:
        if self.delta is None:
            self.delta = Delta(self.index, "", [])
            self.stream.offer(self)
        self.delta.text += text
        self.delta.finish_reason = reason
        self.delta.stop_reason = stop_reason


class RequestStream:
    """The outputs of one call (prompts × n), as an async iterator of lists of deltas.

    Output `index` belongs to prompt `index // n`. Raises EngineDeadError when the engine is gone and RequestError when
    the core refuses an output. `close()` ends what still runs; `async with` does so on the way out.

    Instead of iterating, a reader may set `sink` and await `woken`: the sink is called whenever there are new deltas,
    without waking a task; it takes them and says True, or leaves them to be merged and says False.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        client: Client,
        arrived: float,
        origin: Origin,
        terms: Terms = NO_TERMS,
    ):
        self.prompts = prompts
        self.prompt_lengths = [length_of(prompt) for prompt in prompts]
        self.params = params
        self.arrived = arrived
        self.origin = origin
        self.terms = terms
        self.cached_tokens = [0] * len(prompts)
        # By output, where they are asked for; complete when its first token comes.
        self.prompt_logprobs: dict[int, list[TokenLogprob | None]] = {}
        self.live: dict[int, Output] = {}  # by handle
        self.sink: Callable[[], bool] | None = None
        self.client = client  # of the core that has it
        self.moved = False  # it began again on another replica
        self._ready: list[Output] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def prompt_tokens(self) -> int:
        return sum(self.prompt_lengths)

    def offer(self, output: Output) -> None:
        """An output has a delta."""
        if not self._ready:
            self.client.touched.append(self)
        self._ready.append(output)

    def flush(self) -> None:
        """Let the reader have what is new."""
        if self.sink is not None:
            try:
                if self.sink() and self.live:
                    return
            except Exception as error:  # the reader's own, and its alone: other streams go on
                self.fail(error)
        self.wake()

    def fail(self, error: Exception) -> None:
        self._error = error
        self.sink = None
        self.wake()

    def wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def woken(self) -> None:
        """Wait until there is something that no sink took, an error, or the end."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    @property
    def untouched(self) -> bool:
        """Whether nothing has come of it yet, so that another core may begin it again."""
        everything = len(self.prompts) * self.params.n
        return len(self.live) == everything and not any(output.count for output in self.live.values())

    @property
    def has_new(self) -> bool:
        return bool(self._ready)

    @property
    def open(self) -> bool:
        """Whether more may come; raises the error if it was one that ended the stream."""
        if self._error is not None:
            raise self._error
        return bool(self.live)

    def take(self) -> list[Delta]:
        """What is new."""
        deltas: list[Delta] = []
        for output in self._ready:
            if output.delta is not None:
                deltas.append(output.delta)
                output.delta = None
        self._ready.clear()
        return deltas

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> list[Delta]:
        while not self._ready:
            if not self.open:
                raise StopAsyncIteration
            await self.woken()
        return self.take()

    def close(self) -> None:
        if self.live:
            self.client.abort(self)

    async def __aenter__(self) -> "RequestStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class Whole:
    """One output, put together from its deltas."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason

    @property
    def text(self) -> str:
        return "".join(self.texts)


async def gather(stream: RequestStream) -> list[Whole]:
    """Read a stream to its end."""
    outputs = [Whole() for _ in range(len(stream.prompts) * stream.params.n)]
    async for deltas in stream:
        for delta in deltas:
            outputs[delta.index].add(delta)
    return outputs
