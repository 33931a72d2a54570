"""What the endpoints share."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request

from engine.api.body import Body, read_json
from engine.api.chat_protocol import ChatRequest
from engine.api.errors import ApiError
from engine.api.limits import check_queue, check_request, check_texts
from engine.api.options import HttpOptions, Limits
from engine.api.protocol import CompletionRequest
from engine.errors import RequestError
from engine.frontend.connect import EngineClient
from engine.frontend.prompts import Prompt, Text
from engine.frontend.sampling import SamplingParams
from engine.frontend.streams import Origin
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.truncation import encode_end, kept_tokens, truncate

# Longer texts are tokenized on a thread: the library lets go of the interpreter, and streams go on meanwhile.
LONG_TEXT = 4096
SHORT_FIELDS = frozenset({"role", "content", "name"})  # of a message: those whose length is known beforehand
MANY_MESSAGES = 32  # are rendered on a thread too, as templates are programs in Python
# Threads that tokenize and render: more would take the cores from the engine.
TEXT_THREADS = 2

Result = TypeVar("Result")
Served = TypeVar("Served", CompletionRequest, ChatRequest)


@dataclass
class ApiState:
    """One API server: its client of the engine, and what it calls its model."""

    client: EngineClient
    names: tuple[str, ...]  # the first is shown, all are accepted
    options: HttpOptions = field(default_factory=HttpOptions)
    created: int = 0  # of the model card, seconds since 1970
    model_info: dict[str, Any] = field(default_factory=dict)
    sampling_defaults: dict[str, int | float] = field(default_factory=dict)  # of requests, by fields of SamplingParams
    adapters: dict[str, str] = field(default_factory=dict)  # names and folders, as the core last said

    def __post_init__(self) -> None:
        self._threads = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")
        self._longest_token = self.tokenizer.longest_token  # found now rather than by the first request

    @property
    def model(self) -> str:
        return self.names[0]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.client.tokenizer

    async def adapter_of(self, name: str | None) -> str:
        """The adapter that a request's model names, "" for none; ApiError if neither a model nor an adapter does."""
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
        """Ask the core which adapters it serves."""
        self.adapters = await self.client.call("adapters")

    def origin(self, request: Request, head: dict[str, Any]) -> Origin:
        """Whose request it is; `head` are the first fields of its answer."""
        client = request.client
        return Origin(head["id"], head["model"], f"{client.host}:{client.port}" if client else "")

    # ------------------------------------------------------------------------------------------------------- limits

    @property
    def limits(self) -> Limits:
        return self.options.limits

    async def read(self, request: Request, kind: type[Body]) -> Body:
        """Receive and decode a body; ApiError or RequestError if it can't be taken."""
        return await read_json(request, kind, self.limits)

    async def read_request(self, request: Request, kind: type[Served]) -> Served:
        """As `read`, for a request to the model, which must keep to the limits and find room in the queue."""
        body = await self.read(request, kind)
        check_request(body, self.limits, self.client.ready.max_model_len)
        self.check_queue(1)
        return body

    def check_queue(self, outputs: int) -> None:
        """Raise ApiError 503 if so many more requests would have the queue grow beyond its limit."""
        check_queue(self.client, self.limits, outputs)

    def check_texts(self, texts: Sequence[str], field: str) -> None:
        """Raise RequestError for a text that is longer than any prompt the model takes."""
        check_texts(texts, self.limits, self.client.ready.max_model_len, self._longest_token, field)

    # ------------------------------------------------------------------------------------------------------- prompts

    async def prompts(self, given: Sequence[str | list[int]], add_special_tokens: bool) -> list[Prompt]:
        """Prompts as the core wants them: token ids, or the texts where it tokenizes itself."""
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
        """One prompt as the core wants it; `others` are the characters of prompts that are tokenized beside it."""
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
        """The token ids of a prompt, truncated where its request asks for it, and whether it was.

        RequestError if it can't be.
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
        """Refuse a template of a request's own, unless this server takes such: it is a program, and may never end."""
        known = self.tokenizer.template
        named = template is not None and known is not None and known.is_named(template)
        if template and not named and not self.options.trust_request_chat_template:
            raise RequestError(
                "chat_template: this server runs no templates of requests (--trust-request-chat-template)",
                "chat_template",
            )

    async def chat_prompt(
        self,
        messages: list[dict[str, Any]],
        params: SamplingParams,
        *,
        as_ids: bool = False,
        add_special_tokens: bool = False,
        **options: Any,
    ) -> Prompt:
        """A conversation as the core wants it (see `Tokenizer.render_chat`), truncated as its request asks.

        as_ids: the front end must know its token ids.
        """
        written = await self.render_chat(messages, **options)
        if as_ids:
            return (await self.fit(written, add_special_tokens, params))[0]
        # A template has written all special tokens already, as a rule.
        return await self.prompt(written, add_special_tokens) if isinstance(written, str) else written

    async def render_chat(self, messages: list[dict[str, Any]], **options: Any) -> str | list[int]:
        """See `Tokenizer.render_chat`; on a thread where it may take long."""
        texts = list(message_texts(messages))
        self.check_texts(texts, "messages")
        # Tools may be of any length, and calls of them.
        short = all(value is None or isinstance(value, bool) for value in options.values())
        short &= all(message.keys() <= SHORT_FIELDS for message in messages)
        if short and sum(map(len, texts)) < LONG_TEXT and len(messages) < MANY_MESSAGES:
            return self.tokenizer.render_chat(messages, **options)
        return await self.on_thread(self.tokenizer.render_chat, messages, **options)

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text that is no prompt: of any number, as long as its bytes could be one."""
        self.check_texts((text,), "prompt")
        if len(text) < LONG_TEXT:
            return self.tokenizer.encode(text, add_special_tokens)
        return await self.on_thread(self.tokenizer.encode, text, add_special_tokens)

    async def decode(self, ids: list[int]) -> str:
        """The text of token ids, special ones included."""
        if len(ids) < LONG_TEXT:
            return self.tokenizer.decode(ids, skip_special_tokens=False)
        return await self.on_thread(self.tokenizer.decode, ids, skip_special_tokens=False)

    async def token_texts(self, ids: list[int]) -> list[str]:
        """Each token as a text of its own."""
        if len(ids) < LONG_TEXT:
            return list(map(self.tokenizer.token_text, ids))
        return await self.on_thread(lambda: list(map(self.tokenizer.token_text, ids)))

    async def on_thread(self, call: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """Run on one of the few threads for texts; streams go on meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(call, *arguments, **options))


def message_texts(messages: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The texts of a conversation: of its contents, and of their parts."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else (content,):
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                yield text
