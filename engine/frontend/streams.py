"""The outputs of one request, which arrive as deltas. Deltas are merged if the reader is slow."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from engine.errors import RequestError
from engine.frontend.detokenizer import Detokenizer
from engine.frontend.feature_cache import PromptInputs, placed_inputs
from engine.frontend.prompts import Prompt, length_of
from engine.frontend.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.frontend.tokenizer import Tokenizer


class TokenLogprob(msgspec.Struct, frozen=True, gc=False):
    """The logprob of a sampled token, its rank (1 is the most likely), and the most likely tokens in order."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]  # (id, logprob)


class Delta(msgspec.Struct, gc=False):
    """The part of one output that is new since the last read."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Origin(msgspec.Struct, frozen=True):
    """Where a request comes from, for the log."""

    request: str = ""  # the id in the response
    model: str = ""
    client: str = ""  # address
    trace: dict[str, str] = {}  # headers of the client's trace


class RequestOptions(msgspec.Struct, frozen=True):
    """What else the core needs to know of a request, besides its prompts and sampling parameters."""

    cache_salt: str = ""
    priority: int = 0
    adapter: str = ""
    remote_prefill: bool = False  # set by the router, see AddRequest

    def __post_init__(self) -> None:
        for field in ("cache_salt", "adapter"):
            try:
                getattr(self, field).encode()
            except UnicodeEncodeError as error:
                raise RequestError(f"{field} contains a lone surrogate: {error.reason}", field) from None


NO_OPTIONS = RequestOptions()


class Client(Protocol):
    """The part of a CoreClient that its streams use."""

    touched: list["RequestStream"]  # streams to flush after the current message of the core

    def abort(self, stream: "RequestStream") -> None: ...


class Output:
    """One live output: the front end's part of a request of the core."""

    __slots__ = (
        "cached_tokens", "count", "delta", "detokenizer", "first_at", "handle", "include_stop", "index", "last_at",
        "prompt", "prompt_logprobs", "stream", "top", "ttft_s", "user_stop_ids", "waited_s", "was_admitted",
    )  # fmt: skip

    def __init__(self, handle: int, index: int, prompt: int, stream: "RequestStream", tokenizer: "Tokenizer | None"):
        """`tokenizer` None: the core detokenizes."""
        params = stream.params
        self.handle = handle
        self.index = index
        self.prompt = prompt  # which of the stream's prompts
        self.stream = stream
        self.count = 0
        self.first_at = self.last_at = 0.0
        self.waited_s = self.ttft_s = 0.0
        self.was_admitted = False
        self.cached_tokens = 0
        self.delta: Delta | None = None
        self.include_stop = params.include_stop_str_in_output
        self.top = params.logprobs  # alternatives per token; None: no logprobs
        self.prompt_logprobs: list[TokenLogprob | None] = [None]  # the first token has none
        if params.prompt_logprobs is not None:
            stream.prompt_logprobs[index] = self.prompt_logprobs
        self.user_stop_ids = frozenset(params.stop_token_ids or ())
        self.detokenizer = None
        if tokenizer is not None:
            given = stream.prompts[prompt]
            assert isinstance(given, list), "a text was not tokenized"
            self.detokenizer = Detokenizer(
                tokenizer,
                given,
                stop=params.stops,
                include_stop=self.include_stop,
                skip_special_tokens=params.skip_special_tokens,
                visible_ids=params.visible_special_ids,
                min_tokens=params.min_tokens,
            )

    def add_token(self, token: int, text: str, logprob: TokenLogprob | None) -> None:
        """Add a token to the delta that the reader takes next."""
        self.count += 1
        delta = self.delta
        if delta is None:
            delta = self.delta = Delta(self.index, text, [token])
            self.stream.add_ready(self)
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
            self.stream.add_ready(self)
        self.delta.text += text
        self.delta.finish_reason = reason
        self.delta.stop_reason = stop_reason


class RequestStream:
    """The outputs of one request (prompts × n), as an async iterator of lists of deltas.

    Output `index` belongs to prompt `index // n`. Iterating raises EngineDeadError if the engine is gone, and
    RequestError if the core rejects an output. `close()` aborts the outputs that still run, as does leaving
    `async with`.

    Instead of iterating, a reader may set `sink` and await `wait`. The sink is called whenever there are new deltas,
    without waking a task. It either takes them and returns True, or leaves them to be merged and returns False.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        client: Client,
        arrived: float,
        origin: Origin,
        options: RequestOptions = NO_OPTIONS,
        inputs: Sequence[PromptInputs] = (),
        second_segments: Sequence[int] = (),
    ):
        self.prompts = prompts
        self.inputs = inputs  # multimodal inputs of each prompt; empty: there are none
        self.second_segments = second_segments  # of a model that pools pairs of texts: see AddRequest
        self.vectors: dict[int, bytes] = {}  # of a model that pools, by output
        self.prompt_lengths = [length_of(prompt) for prompt in prompts]
        self.params = params
        self.arrived = arrived
        self.origin = origin
        self.options = options
        self.cached_tokens = [0] * len(prompts)
        # By output, if they were requested; complete when the output's first token arrives.
        self.prompt_logprobs: dict[int, list[TokenLogprob | None]] = {}
        self.live: dict[int, Output] = {}  # by handle
        self.sink: Callable[[], bool] | None = None
        self.client = client  # of the core that runs it
        self.moved = False  # it was retried on another replica
        self.held = False  # it waits for a replica that is being started
        self._ready: list[Output] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def prompt_tokens(self) -> int:
        return sum(self.prompt_lengths)

    def add_ready(self, output: Output) -> None:
        """An output has a new delta."""
        if not self._ready:
            self.client.touched.append(self)
        self._ready.append(output)

    def flush(self) -> None:
        """Hand the new deltas to the reader: to its sink, or by waking it."""
        if self.sink is not None:
            try:
                if self.sink() and self.live:
                    return
            except Exception as error:  # an error of this reader; other streams continue
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

    async def wait(self) -> None:
        """Wait for deltas that the sink has not taken, an error, or the end."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    @property
    def has_no_output(self) -> bool:
        """Whether no output has a token or has ended, so that the request may be retried on another core."""
        outputs = len(self.prompts) * self.params.n
        return len(self.live) == outputs and not any(output.count for output in self.live.values())

    @property
    def has_deltas(self) -> bool:
        return bool(self._ready)

    @property
    def error(self) -> Exception | None:
        """What ended the stream, unless it ended as it should, or has not ended."""
        return self._error

    @property
    def is_open(self) -> bool:
        """Whether more deltas may come; raises the error that ended the stream, if any."""
        if self._error is not None:
            raise self._error
        return bool(self.live) or self.held

    def take_deltas(self) -> list[Delta]:
        """Take the new deltas."""
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
            if not self.is_open:
                raise StopAsyncIteration
            await self.wait()
        return self.take_deltas()

    def close(self) -> None:
        if self.live or self.held:
            self.client.abort(self)

    def release_inputs(self) -> None:
        """All outputs have ended: the features of its multimodal inputs may be evicted."""
        for inputs in self.inputs:
            for one in placed_inputs(inputs):
                one.input.release()

    async def __aenter__(self) -> "RequestStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class CollectedOutput:
    """One output, collected from its deltas."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.first_at: float | None = None  # when its first delta was read, on the monotonic clock

    def add_delta(self, delta: Delta) -> None:
        if self.first_at is None:
            self.first_at = time.monotonic()
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason

    @property
    def text(self) -> str:
        return "".join(self.texts)


async def collect_outputs(stream: RequestStream) -> list[CollectedOutput]:
    """Read a stream to its end."""
    outputs = [CollectedOutput() for _ in range(len(stream.prompts) * stream.params.n)]
    async for deltas in stream:
        for delta in deltas:
            outputs[delta.index].add_delta(delta)
    return outputs
