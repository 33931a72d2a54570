"""ApiState, which all endpoints share."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request

from engine.api.body import Body, read_json
from engine.api.chat_protocol import ChatRequest
from engine.api.error_responses import ApiError
from engine.api.fingerprint import system_fingerprint
from engine.api.http_options import HttpOptions, Limits
from engine.api.key_limit import KeyLoads
from engine.api.limits import check_count, check_queue, check_request, check_texts
from engine.api.pooling_protocol import PoolingRequest
from engine.api.protocol import CompletionRequest, SampledRequest
from engine.api.response_peers import SharedResponses
from engine.api.scale_state import Scaling
from engine.errors import RequestError
from engine.frontend.answer_format import AnswerFormat
from engine.frontend.beam_search import BeamStream
from engine.frontend.connect import EngineClient
from engine.frontend.feature_cache import PromptInputs
from engine.frontend.media_inputs import (
    Conversation,
    MediaInputs,
    PreparedInputs,
    PromptWithInputs,
    read_conversation,
    release,
    release_placed,
    truncate_with_inputs,
)
from engine.frontend.parsing.names import NONE
from engine.frontend.prompts import Prompt, Text
from engine.frontend.sampling_params import SamplingParams
from engine.frontend.streams import Origin, RequestOptions, RequestStream
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.truncation import encode_end, kept_tokens, truncate
from engine.media.fetch import Resolver

# Longer texts are tokenized on a thread. The library releases the GIL, so streams continue meanwhile.
LONG_TEXT = 4096
SHORT_FIELDS = frozenset({"role", "content", "name"})  # fields of a message whose length is checked
LONGEST_TRACE = 512  # characters of a header that names a trace
MANY_MESSAGES = 32  # from here on, a chat is rendered on a thread too
TEXT_THREADS = 2  # to tokenize and render; more would take cores from the engine

Result = TypeVar("Result")
Served = TypeVar("Served", CompletionRequest, ChatRequest)


@dataclass
class ApiState:
    """The state of one API process: its client of the engine, its options, and the names of its models."""

    client: EngineClient
    names: tuple[str, ...]  # of the model; all are accepted, responses show the first
    options: HttpOptions = field(default_factory=HttpOptions)
    created: int = 0  # of the model card, seconds since 1970
    sampling_defaults: dict[str, int | float] = field(default_factory=dict)  # by fields of SamplingParams
    adapters: dict[str, str] = field(default_factory=dict)  # names and folders, as last reported by the core
    resolve: Resolver | None = None  # replaces the system's lookup of the hosts of media
    key_loads: KeyLoads | None = None  # requests of each API key, if they are limited
    process: int = 0  # the number of this API process
    scaling: Scaling | None = None  # of the replicas; None: they stay as they are
    response_folder: str = ""  # of the sockets by which API processes share responses; empty: there is one process

    def __post_init__(self) -> None:
        self._threads = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")
        self._longest_token = self.tokenizer.longest_token  # computed at the start, not by the first request
        takes_media = self.client.ready.mm is not None
        self.fingerprint = system_fingerprint(self.client.ready)
        self.answers = AnswerFormat(self.tokenizer, self.options.tool_call_parser, self.options.reasoning_parser)
        self.responses = SharedResponses(self.options.limits, self.process, self.response_folder)
        self.media = MediaInputs(self.client, self.options.media, self.resolve) if takes_media else None

    @property
    def model(self) -> str:
        return self.names[0]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.client.tokenizer

    async def adapter_of(self, name: str | None) -> str:
        """The adapter that a request's `model` names, "" for the base model. Raises ApiError 404 if there is none."""
        if not name or name in self.names:
            return ""
        if name not in self.adapters:  # another API process may have loaded it
            await self.refresh_adapters()
        if name not in self.adapters:
            known = ", ".join(map(repr, (*self.names, *self.adapters)))
            message = f"the model {name!r} is not served here: this server has {known}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return name

    async def refresh_adapters(self) -> None:
        """Get the adapters from the core."""
        self.adapters = await self.client.call_utility("adapters")

    def submit(
        self,
        request: Request,
        body: SampledRequest | PoolingRequest,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        head: dict[str, Any],
        adapter: str,
        inputs: Sequence[PromptInputs] = (),
        second_segments: Sequence[int] = (),
    ) -> RequestStream:
        """Send the prompts of a request to the engine. Raises ApiError 503 if the queue is full.

        Args:
            request: of the client.
            body: of the request.
            prompts: of the request.
            params: of the request.
            head: the first fields of the response.
            adapter: that the request names.
            inputs: multimodal inputs of each prompt; they are released if the request is refused.
            second_segments: of pairs of texts, see AddRequest.
        """
        try:
            self.check_queue(len(prompts) * params.n)
            if self.media is not None and not any(inputs):
                for prompt in prompts:
                    self.media.check(prompt.text if isinstance(prompt, Text) else prompt)
            client = request.client
            address = f"{client.host}:{client.port}" if client else ""
            origin = Origin(head["id"], head["model"], address, trace_headers(request))
            options = RequestOptions(body.cache_salt or "", body.priority or 0, adapter)
            if params.use_beam_search:
                if any(inputs):
                    raise RequestError("use_beam_search takes texts only", "use_beam_search")
                return BeamStream(self.client, prompts, params, options, origin)
            given = inputs if any(inputs) else ()
            return self.client.add_request(prompts, params, options, origin, given, second_segments)
        except BaseException:
            for one in inputs:
                release_placed(one)
            raise

    # ------------------------------------------------------------------------------------------------------- limits

    @property
    def limits(self) -> Limits:
        return self.options.limits

    async def read(self, request: Request, kind: type[Body]) -> Body:
        """Receive and decode a body; ApiError or RequestError if it is not valid."""
        return await read_json(request, kind, self.limits, takes_media=self.client.ready.mm is not None)

    async def read_request(self, request: Request, kind: type[Served]) -> Served:
        """As `read`, and check the limits of requests to the model and of the queue."""
        body = await self.read(request, kind)
        check_request(body, self.limits, self.client.ready.max_model_len)
        self.check_queue(1)
        return body

    def check_prompts(self, count: int, field: str) -> None:
        """Raise RequestError for more prompts than --max-prompts."""
        check_count(count, self.limits, field)

    def check_queue(self, outputs: int) -> None:
        """Raise ApiError 503 if `outputs` more requests would exceed --max-queue."""
        check_queue(self.client, self.limits, outputs)

    def check_texts(self, texts: Sequence[str], field: str) -> None:
        """Raise RequestError for a text that is longer than any prompt the model can serve."""
        check_texts(texts, self.limits, self.client.ready.max_model_len, self._longest_token, field)

    # ------------------------------------------------------------------------------------------------------- prompts

    async def prompts(self, given: Sequence[str | list[int]], add_special_tokens: bool) -> list[Prompt]:
        """Prompts for the core: token ids, or texts if the core tokenizes."""
        texts = [one for one in given if isinstance(one, str)]
        self.check_texts(texts, "prompt")
        if self.client.ready.inline:
            return [Text(one, add_special_tokens) if isinstance(one, str) else one for one in given]
        if sum(map(len, texts)) >= LONG_TEXT:
            return [
                await self.prompt(one, add_special_tokens, LONG_TEXT) if isinstance(one, str) else one for one in given
            ]
        return [self.tokenizer.encode(one, add_special_tokens) if isinstance(one, str) else one for one in given]

    async def prompt(self, text: str, add_special_tokens: bool, others: int = 0) -> Prompt:
        """One prompt for the core; `others` is the number of characters of prompts that are tokenized with it."""
        self.check_texts((text,), "prompt")
        if self.client.ready.inline:
            return Text(text, add_special_tokens)
        return await self._encode_prompt(text, add_special_tokens, others)

    async def _encode_prompt(self, text: str, add_special_tokens: bool, others: int = 0) -> list[int]:
        most = self.client.ready.max_model_len
        if len(text) + others < LONG_TEXT:
            return self.tokenizer.encode(text, add_special_tokens)
        return await self.on_thread(self.tokenizer.encode_prompt, text, add_special_tokens, most)

    async def fit(
        self, given: str | list[int], add_special_tokens: bool, params: SamplingParams
    ) -> tuple[list[int], bool]:
        """The token ids of a prompt, truncated as the request specifies, and whether a part was cut off.

        Raises RequestError if the truncation is out of range.
        """
        keep = kept_tokens(params, self.client.ready.max_model_len)
        if keep is None:
            if isinstance(given, list):
                return given, False
            self.check_texts((given,), "prompt")
            return await self._encode_prompt(given, add_special_tokens), False
        if isinstance(given, list):
            ids, cut = given, False
        else:
            side = params.truncation_side
            ids, cut = await self.on_thread(encode_end, self.tokenizer, given, keep, side, add_special_tokens)
        kept = truncate(ids, keep, params.truncation_side, self.tokenizer.leading_ids)
        return kept, cut or len(kept) < len(ids)

    def check_template(self, template: str | None) -> None:
        """Raise RequestError for a template in a request without --trust-request-chat-template: it may run forever."""
        known = self.tokenizer.template
        named = template is not None and known is not None and known.is_named(template)
        if template and not named and not self.options.trust_request_chat_template:
            raise RequestError(
                "chat_template: this server does not run templates sent in requests (--trust-request-chat-template)",
                "chat_template",
            )

    def check_calls(self, *, own_template: bool) -> None:
        """Raise RequestError if calls of the model can't be recognized.

        `own_template`: the model's chat template is used, not one of the request.
        """
        form = self.answers.tools
        if form == NONE:
            raise RequestError(
                "the form of this model's tool calls is unknown: start the server with --tool-call-parser", "tools"
            )
        if own_template and form != "hermes" and not self.tokenizer.takes_tools:
            raise RequestError(
                f"the model's chat template takes no tools, so --tool-call-parser must be hermes, not {form}", "tools"
            )

    def conversation(self, messages: list[dict[str, Any]]) -> Conversation:
        """The messages of a request in the form that templates expect. Raises RequestError, with the field."""
        return read_conversation(messages, self.media)

    async def chat_prompt(
        self,
        conversation: Conversation,
        params: SamplingParams,
        *,
        as_ids: bool = False,
        add_special_tokens: bool = False,
        **options: Any,
    ) -> PromptWithInputs:
        """A conversation as a prompt for the core, truncated as the request specifies.

        Args:
            conversation: with its multimodal inputs, which are fetched and processed.
            params: of the request.
            as_ids: tokenize here even if the core tokenizes.
            add_special_tokens: add them although the template has usually written them.
            options: of `Tokenizer.render_chat`.
        """
        written = await self.render_chat(conversation, **options)
        if conversation.media:
            return await self._prompt_with_inputs(written, conversation, params, add_special_tokens, as_ids)
        if as_ids:
            return PromptWithInputs((await self.fit(written, add_special_tokens, params))[0], ())
        prompt = await self.prompt(written, add_special_tokens) if isinstance(written, str) else written
        return PromptWithInputs(prompt, ())

    async def _prompt_with_inputs(
        self,
        written: str | list[int],
        conversation: Conversation,
        params: SamplingParams,
        add_special_tokens: bool,
        as_ids: bool,
    ) -> PromptWithInputs:
        """The prompt with its inputs in place of the placeholders."""
        assert self.media is not None
        keep = kept_tokens(params, self.client.ready.max_model_len)
        prepared = await self._prepare(written, conversation)
        try:
            found = await self.on_thread(self.media.place, written, prepared, add_special_tokens=add_special_tokens)
            if as_ids and not found.is_complete:
                raise RequestError(
                    "token ids, logprobs and truncation of a prompt with images, sounds or videos are not available on "
                    "this server, whose core tokenizes or processes them (--ablate)",
                    "messages",
                )
            return truncate_with_inputs(found, keep, params.truncation_side, self.tokenizer.leading_ids)
        except BaseException:
            release(prepared)
            raise

    async def _prepare(self, written: str | list[int], conversation: Conversation) -> PreparedInputs:
        assert self.media is not None
        self.media.check(written, conversation.media)
        return await self.media.prepare(conversation.media)

    async def expanded_ids(self, written: str | list[int], conversation: Conversation, special: bool) -> list[int]:
        """The token ids of a conversation with its multimodal inputs, for /tokenize."""
        assert self.media is not None
        prepared = await self._prepare(written, conversation)
        try:
            found = await self.on_thread(self.media.place, written, prepared, add_special_tokens=special)
        finally:
            release(prepared)
        if not found.is_complete:
            raise RequestError(
                "images, sounds and videos can't be counted on this server, whose core tokenizes or processes them "
                "(--ablate)",
                "messages",
            )
        assert isinstance(found.prompt, list)
        return found.prompt

    async def render_chat(self, conversation: Conversation, **options: Any) -> str | list[int]:
        """See `Tokenizer.render_chat`; on a thread if it may take long."""
        messages = conversation.messages
        texts = list(message_texts(messages))
        self.check_texts(texts, "messages")
        # Tools and tool calls may be of any length.
        short = all(value is None or isinstance(value, bool) for value in options.values())
        short &= all(message.keys() <= SHORT_FIELDS for message in messages)
        if conversation.media and self.media is not None:
            options["placeholders"] = self.media.texts
        if short and sum(map(len, texts)) < LONG_TEXT and len(messages) < MANY_MESSAGES:
            return self.tokenizer.render_chat(messages, **options)
        return await self.on_thread(self.tokenizer.render_chat, messages, **options)

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text for /tokenize: any number, if its bytes could be a prompt."""
        self.check_texts((text,), "prompt")
        if len(text) < LONG_TEXT:
            return self.tokenizer.encode(text, add_special_tokens)
        return await self.on_thread(self.tokenizer.encode, text, add_special_tokens)

    async def decode(self, ids: list[int]) -> str:
        """The text of token ids, special ones included."""
        if len(ids) < LONG_TEXT:
            return self.tokenizer.decode(ids, skip_special_tokens=False)
        return await self.on_thread(self.tokenizer.decode, ids, skip_special_tokens=False)

    async def vocabulary_entries(self, ids: list[int]) -> list[str]:
        """Each token as the vocabulary writes it, which marks spaces and bytes with other characters."""
        entry = self.tokenizer.backend.vocabulary_entry
        if len(ids) < LONG_TEXT:
            return list(map(entry, ids))
        return await self.on_thread(lambda: list(map(entry, ids)))

    async def on_thread(self, call: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """Run on one of the text threads, so that streams continue meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(call, *arguments, **options))


def trace_headers(request: Request) -> dict[str, str]:
    """The headers that name the client's trace (W3C's Trace Context), if there are any of a sane length."""
    given = ((name, request.headers.get(name, "")) for name in ("traceparent", "tracestate"))
    return {name: value for name, value in given if 0 < len(value) <= LONGEST_TRACE}


def message_texts(messages: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The texts of a conversation: its contents, or their parts."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else (content,):
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                yield text
