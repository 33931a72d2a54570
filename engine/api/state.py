"""What the endpoints share."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from engine.api.errors import ApiError
from engine.errors import RequestError
from engine.frontend.connect import EngineClient
from engine.frontend.prompts import Prompt, Text
from engine.frontend.streams import Origin
from engine.frontend.tokenizer import Tokenizer

# Longer texts are tokenised on a thread: the library lets go of the interpreter, and streams go on meanwhile.
LONG_TEXT = 4096


@dataclass
class ApiState:
    """One API server: its client of the engine, and what it calls its model."""

    client: EngineClient
    names: tuple[str, ...]  # the first is shown, all are accepted
    api_key: str | None = None
    created: int = 0  # of the model card, seconds since 1970
    model_info: dict[str, Any] = field(default_factory=dict)
    trust_request_chat_template: bool = False
    adapters: dict[str, str] = field(default_factory=dict)  # names and folders, as the core last said

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

    async def prompt(self, text: str, add_special_tokens: bool) -> Prompt:
        """The prompt as the core wants it: token ids, or the text where it tokenises itself."""
        if self.client.ready.inline:
            return Text(text, add_special_tokens)
        return await self.encode(text, add_special_tokens)

    def check_template(self, template: str | None) -> None:
        """Refuse a template of a request's own, unless this server takes such: it is a program, and may never end."""
        known = self.tokenizer.template
        if template and not self.trust_request_chat_template and not (known is not None and known.is_named(template)):
            raise RequestError(
                "chat_template: this server runs no templates of requests (--trust-request-chat-template)",
                "chat_template",
            )

    async def chat_prompt(
        self, messages: list[dict[str, Any]], *, add_special_tokens: bool = False, **options: Any
    ) -> Prompt:
        """A conversation as the core wants it (see `Tokenizer.render_chat`)."""
        tokenizer = self.tokenizer
        if tokenizer.template is None and sum(len(str(message.get("content"))) for message in messages) >= LONG_TEXT:
            return await asyncio.to_thread(tokenizer.encode_chat, messages, **options)
        written = tokenizer.render_chat(messages, **options)
        # A template has written all special tokens already, as a rule.
        return await self.prompt(written, add_special_tokens) if isinstance(written, str) else written

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) < LONG_TEXT:
            return self.tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)
