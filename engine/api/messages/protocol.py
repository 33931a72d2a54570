"""The bodies of Anthropic's API. A field that they do not have is refused."""

from typing import Any

import msgspec

Object = dict[str, Any]


class CountTokensRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields that make the prompt; contents of messages are checked in `conversation`, other objects in `chat`."""

    messages: list[Object]
    model: str | None = None
    system: str | list[Object] | None = None
    tools: list[Object] | None = None
    tool_choice: Object | None = None
    thinking: Object | None = None
    output_config: Object | None = None
    cache_control: Object | None = None  # prefixes are always cached


class MessagesRequest(CountTokensRequest, kw_only=True):
    """The fields that the prompt does not depend on."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None
    metadata: Object | None = None
    service_tier: str | None = None
