"""`LLM`: the engine as a Python object, without a server."""

import asyncio
import functools
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar

from engine.config import EngineConfig
from engine.errors import EngineDeadError, RequestError
from engine.frontend.answer_format import AnswerFormat
from engine.frontend.connect import EngineClient
from engine.frontend.content_parts import MediaPart
from engine.frontend.media_inputs import (
    MediaInputs,
    PromptWithInputs,
    parts_of_data,
    read_conversation,
    release,
    release_placed,
    truncate_with_inputs,
)
from engine.frontend.sampling_params import SamplingParams
from engine.frontend.streams import CollectedOutput, RequestOptions, TokenLogprob, collect_outputs
from engine.frontend.structured_outputs import check_grammar
from engine.frontend.thinking_budget import check_thinking_budget, with_thinking_budget
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.truncation import kept_tokens, truncate
from engine.llm_outputs import (
    CompletionOutput,
    EmbeddingRequestOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    ScoringRequestOutput,
)
from engine.llm_pooling import PoolingCalls
from engine.start import Engine, start_engine

Prompt = str | list[int] | dict[str, Any]
Conversation = list[dict[str, Any]]
Result = TypeVar("Result")

# Requests with images, sounds or videos beyond those that run: their inputs are prepared ahead. More would fill the
# shared memory.
AHEAD = 16
CLOSE_TIMEOUT_S = 5.0


class _Given(NamedTuple):
    """A prompt as it was given: its text for the output, and what is tokenized, with its multimodal inputs."""

    text: str | None
    written: str | list[int]
    parts: list[MediaPart]
    special: bool = True  # add special tokens


class LLM:
    """An engine for one model: `LLM("smollm2-135m").generate(["Hello"])`.

    Keyword arguments are the fields of EngineConfig. With `data_parallel_size` the prompts are distributed over the
    replicas. The engine ends with `close()`, at the end of a `with` block, or with the program.
    """

    def __init__(self, model: str, **options: Any):
        try:
            config = EngineConfig(model=model, **options)
        except TypeError as error:  # an unknown field, which Python's message names
            raise TypeError(str(error).replace("EngineConfig.__init__", "LLM")) from None
        self._engine = start_engine(config)
        self.config = self._engine.config
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="redline-llm", daemon=True)
        self._thread.start()
        self._client = self._engine.connect()
        ready = self._engine.ready
        self._media = MediaInputs(self._client, self.config.media_options) if ready.mm is not None else None
        self._places = asyncio.Semaphore(ready.max_num_seqs * self.config.data_parallel_size + AHEAD)
        self._run(self._open())
        self._finalizer = weakref.finalize(self, _shut_down, self._engine, self._client, self._loop, self._thread)

    async def _open(self) -> None:
        self._client.open()
        self._engine.watch(self._client.core_lost_threadsafe)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    @functools.cached_property
    def _answers(self) -> AnswerFormat:
        return AnswerFormat(self.tokenizer)

    @property
    def vocab_size(self) -> int:
        return self._engine.ready.vocab_size

    def default_sampling_params(self) -> SamplingParams:
        """The parameters of requests without `sampling_params`: SamplingParams with the model's generation_config.json.

        As in vLLM, a SamplingParams that the caller creates does not contain the model's defaults.
        """
        return self._engine.generation.params()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str = "",
        progress: bool | Callable[[], None] = False,
    ) -> list[RequestOutput]:
        """Generate outputs for one prompt or many, in the order of the prompts.

        Raises RequestError if a prompt can't be served.

        Args:
            prompts: texts, lists of token ids, or {"prompt_token_ids": [...]}. With images, audio or video a prompt is
                {"prompt": "…", "multi_modal_data": {"image": one or a list}}, and has the model's placeholder for each.
            sampling_params: one for all prompts or one each; by default the model's (`default_sampling_params`).
            adapter: the name of a loaded adapter.
            progress: show a progress bar; or a function that is called after each request, from another thread.
        """
        listed = as_list(prompts)
        given = [self._given(prompt) for prompt in listed]
        params = self._params_for(len(listed), sampling_params)
        return self._run(self._generate(given, params, adapter, progress))

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        adapter: str = "",
        progress: bool | Callable[[], None] = False,
    ) -> list[RequestOutput]:
        """Generate replies to one conversation (a list of messages) or many, with the model's chat template.

        Args:
            messages: one conversation, or a list of them. Besides the parts of the HTTP API, images may be given as
                {"type": "image", "image": PIL image}.
            sampling_params: as in `generate`.
            add_generation_prompt: end the prompt with the header of the assistant's reply.
            adapter: as in `generate`.
            progress: as in `generate`.
        """
        first = messages[0] if messages else None
        several: list[Any] = list(messages) if isinstance(first, list) else [messages]
        given = []
        for conversation in several:
            read = read_conversation(conversation, self._media)
            options: dict[str, Any] = {"placeholders": self._media.texts} if self._media and read.media else {}
            written = self.tokenizer.render_chat(read.messages, add_generation_prompt=add_generation_prompt, **options)
            given.append(_Given(written if isinstance(written, str) else None, written, read.media, special=False))
        params = self._params_for(len(given), sampling_params)
        return self._run(self._generate(given, params, adapter, progress))

    def embed(
        self,
        prompts: str | list[int] | Sequence[str | list[int]],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Compute the embeddings of texts or token ids, in order: `output.outputs.embedding`.

        Raises RequestError if the model does not return embeddings, or a text can't be served.

        Args:
            prompts: one or many; texts get the tokenizer's special tokens.
            dimensions: how many of the first numbers to keep, of a matryoshka model.
            normalize: divide embeddings by their length; by default as the model declares.
            truncate_prompt_tokens: keep the first tokens of each prompt; -1: as many as the model takes.
        """
        listed: Any = as_list(prompts)
        calls = PoolingCalls(self._client, self.tokenizer)
        return self._run(calls.embed(listed, dimensions, normalize, truncate_prompt_tokens))

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        *,
        use_activation: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> list[ScoringRequestOutput]:
        """Compute how well texts suit others, in order: `output.outputs.score`.

        Raises RequestError if the model does not pool, or a pair can't be served.

        Args:
            data_1: one text, which is paired with each second one, or as many as `data_2`.
            data_2: the second texts.
            use_activation: apply the activation of a classification head.
            truncate_prompt_tokens: cut off the end of the second text; -1: if the pair is too long for the model.
        """
        calls = PoolingCalls(self._client, self.tokenizer)
        return self._run(calls.score(data_1, data_2, truncate_prompt_tokens, activate=use_activation))

    def load_adapter(self, name: str, path: str) -> None:
        """Load a LoRA adapter from a folder under a name. Raises RedlineError if it can't be loaded."""
        self._run(self._client.call_utility("load_adapter", name=name, path=path))

    def unload_adapter(self, name: str) -> None:
        self._run(self._client.call_utility("unload_adapter", name=name))

    def reset_prefix_cache(self) -> None:
        self._run(self._client.call_utility("reset_prefix_cache"))

    def close(self) -> None:
        """End the engine. Further calls have no effect."""
        self._finalizer()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        if not self._thread.is_alive():
            work.close()
            raise EngineDeadError("this LLM is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def _given(self, prompt: Prompt) -> _Given:
        """A prompt of `generate`, with the checks that need no data of its inputs."""
        text = prompt if isinstance(prompt, str) else None
        parts: list[MediaPart] = []
        if isinstance(prompt, dict):
            parts = parts_of_data(prompt.get("multi_modal_data") or {})
            text = prompt.get("prompt") if parts else None
            prompt = prompt.get("prompt_token_ids") or prompt.get("prompt") or ""
        if parts and self._media is None:
            raise RequestError("this model takes texts only: leave multi_modal_data out", "multi_modal_data")
        return _Given(text, prompt if isinstance(prompt, str) else list(prompt), parts)

    async def _complete(self, given: _Given, params: SamplingParams) -> PromptWithInputs:
        """A prompt as token ids, truncated, with its inputs."""
        keep, side = kept_tokens(params, self._engine.ready.max_model_len), params.truncation_side
        leading = self.tokenizer.leading_ids
        if not given.parts:
            written = given.written
            ids = self.tokenizer.encode(written, given.special) if isinstance(written, str) else written
            ids = truncate(ids, keep, side, leading)
            if self._media is not None:
                self._media.check(ids)
            self._client.check_prompt(ids)
            return PromptWithInputs(ids, ())
        assert self._media is not None
        self._media.check(given.written, given.parts)
        prepared = await self._media.prepare(given.parts)
        try:
            found = self._media.place(given.written, prepared, add_special_tokens=given.special)
            return truncate_with_inputs(found, keep, side, leading)
        except BaseException:
            release(prepared)
            raise

    def _params_for(
        self, count: int, params: SamplingParams | Sequence[SamplingParams] | None
    ) -> Sequence[SamplingParams]:
        if self._engine.ready.pooling is not None:
            raise RequestError(f"{self.config.model} generates no texts: use LLM.embed or LLM.score")
        if params is None or isinstance(params, SamplingParams):
            params = [params or self.default_sampling_params()] * count
        for one in params:
            check_thinking_budget(one, self._answers)
        if len(params) != count:
            raise RequestError(
                f"the number of sampling_params ({len(params)}) differs from that of prompts ({count})",
                "sampling_params",
            )
        return params

    async def _generate(
        self,
        given: Sequence[_Given],
        params: Sequence[SamplingParams],
        adapter: str,
        progress: bool | Callable[[], None],
    ) -> list[RequestOutput]:
        from rich.progress import Progress

        # All texts are checked before any is sent.
        complete = [
            None if one.parts else await self._complete(one, each) for one, each in zip(given, params, strict=True)
        ]
        with Progress(disable=progress is not True) as bar:
            counter = bar.add_task("requests", total=len(given))
            done = progress if callable(progress) else functools.partial(bar.advance, counter)
            tasks = [
                asyncio.ensure_future(
                    self._with_inputs(one, each, adapter, done)
                    if found is None
                    else self._generate_one(one.text, found, each, adapter, done)
                )
                for one, found, each in zip(given, complete, params, strict=True)
            ]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

    async def _with_inputs(
        self, given: _Given, params: SamplingParams, adapter: str, done: Callable[[], None]
    ) -> RequestOutput:
        async with self._places:
            found = await self._complete(given, params)
            return await self._generate_one(given.text, found, params, adapter, done)

    async def _generate_one(
        self,
        text: str | None,
        found: PromptWithInputs,
        params: SamplingParams,
        adapter: str,
        done: Callable[[], None],
    ) -> RequestOutput:
        await check_grammar(self._client, params.structured_outputs)
        params = with_thinking_budget(params, self._answers, self.tokenizer, found.prompt)
        began = time.monotonic()
        options, inputs = RequestOptions(adapter=adapter), [found.inputs] if found.inputs else ()
        try:
            submitted = self._client.add_request([found.prompt], params, options, inputs=inputs)
        except BaseException:
            release_placed(found.inputs)
            raise
        async with submitted as stream:
            outputs = await collect_outputs(stream)
            ended = time.monotonic()
            cached = stream.cached_tokens[0]
            scored = stream.prompt_logprobs.get(0)
        done()
        return RequestOutput(
            prompt=text,
            prompt_token_ids=found.prompt if isinstance(found.prompt, list) else [],
            outputs=[self._completion(index, output, params) for index, output in enumerate(outputs)],
            metrics=RequestMetrics(min(output.first_at or ended for output in outputs) - began, ended - began),
            prompt_logprobs=None
            if scored is None
            else [None if one is None else self._logprobs(one) for one in scored],
            num_cached_tokens=cached,
        )

    def _completion(self, index: int, output: CollectedOutput, params: SamplingParams) -> CompletionOutput:
        completion = CompletionOutput(index, output.text, output.token_ids, output.finish_reason, output.stop_reason)
        if params.logprobs is not None:
            completion.logprobs = [self._logprobs(entry) for entry in output.logprobs]
            completion.cumulative_logprob = sum(entry.logprob for entry in output.logprobs)
        return completion

    def _logprobs(self, entry: TokenLogprob) -> dict[int, Logprob]:
        shown = {entry.token: Logprob(entry.logprob, entry.rank, self.tokenizer.token_text(entry.token))}
        for rank, (token, logprob) in enumerate(entry.top, start=1):
            shown.setdefault(token, Logprob(logprob, rank, self.tokenizer.token_text(token)))
        return shown


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many as a list; a list of integers is one prompt."""
    if isinstance(prompts, str | dict):
        return [prompts]
    listed: list[Any] = list(prompts)
    return [listed] if listed and isinstance(listed[0], int) else listed


def _shut_down(engine: Engine, client: EngineClient, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """End the core, then the thread of the loop. Takes no reference to the LLM, since its finalizer calls this."""
    engine.stop()
    if not thread.is_alive():
        return
    asyncio.run_coroutine_threadsafe(_close(client), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


async def _close(client: EngineClient) -> None:
    """Close the client, and wait for the tasks that end with it, such as those of processes for images."""
    client.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=CLOSE_TIMEOUT_S)
