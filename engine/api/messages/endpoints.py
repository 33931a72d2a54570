"""/v1/messages and /v1/messages/count_tokens: chats in the form of Anthropic's API."""

import uuid

import msgspec
from fastapi import Request
from starlette.responses import Response

from engine.api.chat import start_chat
from engine.api.chat_answers import AnswerOptions, DeltaReader
from engine.api.event_stream import EventStream, run_until_disconnect
from engine.api.limits import check_request
from engine.api.messages.chat import MessagesChat
from engine.api.messages.output import MessageEvents, whole_message
from engine.api.messages.protocol import CountTokensRequest, MessagesRequest
from engine.api.request_id import client_id
from engine.api.state import ApiState
from engine.api.tokenizing import conversation_ids
from engine.api.tools import ToolChoice
from engine.frontend.parsing.events import PlainText
from engine.frontend.streams import collect_outputs

PLAIN = AnswerOptions(choice=ToolChoice(tools={}))  # of outputs that are not parsed


async def create_message(state: ApiState, request: Request) -> Response:
    body = await state.read(request, MessagesRequest)
    chat = MessagesChat(body, state.answers, state.tokenizer)
    head = {
        "id": f"msg_{client_id(request.scope) or uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": body.model or state.model,
    }
    with chat.named_here():
        asked = chat.chat_request(body)
        check_request(asked, state.limits, state.client.ready.max_model_len)
        state.check_queue(1)
        stream, answers, _ = await start_chat(state, request, asked, head)
    reader = DeltaReader(PlainText(), PLAIN) if answers is None else answers.reader()
    thinking = None if answers is None else answers.reasoning_tokens(stream)
    if body.stream:
        return EventStream(stream, MessageEvents(stream, head, reader, body.max_tokens, thinking))
    [output] = await run_until_disconnect(request.receive, stream, lambda: collect_outputs(stream))
    message = whole_message(stream, head, reader, output, body.max_tokens, thinking)
    return Response(msgspec.json.encode(message), media_type="application/json")


async def count_tokens(state: ApiState, request: Request) -> Response:
    body = await state.read(request, CountTokensRequest)
    chat = MessagesChat(body, state.answers, state.tokenizer)
    with chat.named_here():
        ids = await conversation_ids(state, request, chat.tokenize_request(), chat.messages)
    return Response(msgspec.json.encode({"input_tokens": len(ids)}), media_type="application/json")
