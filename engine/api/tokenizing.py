"""/tokenize and /detokenize, and the token ids of a conversation."""

from typing import Any

import msgspec
from fastapi import Request
from starlette.responses import Response

from engine.api.chat_protocol import TokenizeRequest, template_options
from engine.api.event_stream import cancel_on_disconnect
from engine.api.protocol import DetokenizeRequest
from engine.api.state import ApiState
from engine.api.tools import check_tools
from engine.errors import RequestError


async def tokenize(state: ApiState, request: Request) -> Response:
    body = await state.read(request, TokenizeRequest)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give either prompt or messages", "prompt")
    if body.messages is not None:
        ids = await conversation_ids(state, request, body, body.messages)
    else:
        await state.adapter_of(body.model)
        ids = await state.encode(body.prompt or "", body.add_special_tokens is not False)
    found: dict[str, Any] = {"count": len(ids), "max_model_len": state.client.ready.max_model_len, "tokens": ids}
    found["token_strs"] = await state.vocabulary_entries(ids) if body.return_token_strs else None
    return Response(msgspec.json.encode(found), media_type="application/json")


async def conversation_ids(
    state: ApiState, request: Request, body: TokenizeRequest, messages: list[dict[str, Any]]
) -> list[int]:
    """The prompt of a chat with these messages and the other fields of `body`."""
    await state.adapter_of(body.model)
    check_tools(body.tools)
    state.check_template(body.chat_template)
    conversation, special = state.conversation(messages), bool(body.add_special_tokens)
    as_text = bool(body.tools) and body.tool_choice != "none"
    written = await state.render_chat(conversation, tools_as_text=as_text, **template_options(body))
    if conversation.media:
        return await cancel_on_disconnect(request.receive, state.expanded_ids(written, conversation, special))
    return await state.encode(written, special) if isinstance(written, str) else written


async def detokenize(state: ApiState, request: Request) -> Response:
    body = await state.read(request, DetokenizeRequest)
    await state.adapter_of(body.model)
    last = state.client.ready.vocab_size - 1
    for token in (min(body.tokens, default=0), max(body.tokens, default=0)):
        if not 0 <= token <= last:
            raise RequestError(f"{token} is not in the vocabulary (0..{last})", "tokens")
    return Response(msgspec.json.encode({"prompt": await state.decode(body.tokens)}), media_type="application/json")
