"""/v1/responses: creates responses, and shows or deletes those that are kept."""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from engine.api.access import KEY
from engine.api.chat import StartedChat, start_chat
from engine.api.error_responses import ApiError
from engine.api.event_stream import EventStream, run_until_disconnect
from engine.api.limits import check_request
from engine.api.logprobs import chat_logprobs
from engine.api.response_store import Turn
from engine.api.responses.conversation import Item, Messages, input_items
from engine.api.responses.output import OutputItems, ShowLogprobs
from engine.api.responses.protocol import ResponsesRequest, renamed
from engine.api.responses.response import NewResponse, ResponseEvents
from engine.api.state import ApiState
from engine.errors import RequestError

PAGE, LARGEST_PAGE = 20, 100  # items in a list, as in OpenAI's API
ORDERS = ("asc", "desc")


async def create_response(state: ApiState, request: Request) -> Response:
    body = await state.read(request, ResponsesRequest)
    body.check()
    owner: int | None = request.scope.get(KEY)
    turns: tuple[Turn, ...] = ()
    if body.previous_response_id:
        turns = (await state.responses.get(body.previous_response_id, owner, "previous_response_id")).turns
    items = input_items(body.input)
    messages = Messages(body.instructions)
    for turn in turns:
        messages.add(turn.items, "previous_response_id")
    messages.add(items)
    head = {"id": state.responses.new_id(), "model": body.model or state.model}
    started = await start(state, request, body, messages, head)
    stream, answers, turns = started.stream, started.answers, (*turns, Turn(items))
    show: ShowLogprobs | None = None
    if body.wants_logprobs:
        show = lambda entries: chat_logprobs(state.tokenizer, entries)["content"]  # noqa: E731
    output = (
        OutputItems(None, show=show)
        if answers is None
        else OutputItems(answers.reader(), answers.reasoning_tokens(stream), show)
    )
    response = NewResponse(body, head, stream, output, state.responses, turns, owner)
    if body.stream:
        return EventStream(stream, ResponseEvents(response))

    async def collect() -> None:
        async for deltas in stream:
            for delta in deltas:
                output.add(delta)

    await run_until_disconnect(request.receive, stream, collect)
    return shown(response.finish())


async def start(
    state: ApiState, request: Request, body: ResponsesRequest, messages: Messages, head: dict[str, Any]
) -> StartedChat:
    """Submit the request as a chat; errors name the fields of this API."""
    try:
        chat = body.chat(messages.messages)
        check_request(chat, state.limits, state.client.ready.max_model_len)
        chat.check()
        state.check_queue(1)
        return await start_chat(state, request, chat, head)
    except RequestError as error:
        field = error.field and renamed(error.field, messages.places)
        raise type(error)(renamed(str(error), messages.places), field) from error


async def retrieve_response(state: ApiState, request: Request) -> Response:
    if request.query_params.get("stream", "false").lower() not in ("false", "0"):
        raise RequestError("stream: a response that is kept can't be streamed again", "stream")
    found = await state.responses.get(request.path_params["response_id"], request.scope.get(KEY))
    return Response(found.body, media_type="application/json")


async def delete_response(state: ApiState, request: Request) -> Response:
    name = request.path_params["response_id"]
    await state.responses.delete(name, request.scope.get(KEY))
    return shown({"id": name, "object": "response", "deleted": True})


async def cancel_response(state: ApiState, request: Request) -> Response:
    name = request.path_params["response_id"]
    await state.responses.get(name, request.scope.get(KEY))
    raise ApiError(
        400,
        f"the response {name!r} has ended; only responses in the background, which this server does not have, can be "
        "canceled: close the connection to end a response",
    )


async def list_input_items(state: ApiState, request: Request) -> Response:
    found = await state.responses.get(request.path_params["response_id"], request.scope.get(KEY))
    query = request.query_params
    order, after = query.get("order", "desc"), query.get("after")
    if order not in ORDERS:
        raise RequestError(f"order must be one of {', '.join(ORDERS)}, not {order!r}", "order")
    given = query.get("limit", str(PAGE))
    limit = int(given) if given.isdecimal() and len(given) < 5 else 0
    if not 1 <= limit <= LARGEST_PAGE:
        raise RequestError(f"limit must lie in 1..{LARGEST_PAGE}, not {given!r}", "limit")
    items: list[Item] = [item for turn in found.turns[:-1] for item in turn.items]
    if order == "desc":
        items.reverse()
    if after is not None:
        begin = next((at for at, item in enumerate(items, 1) if item["id"] == after), None)
        if begin is None:
            raise RequestError(f"after: the response has no input item {after!r}", "after")
        items = items[begin:]
    page = items[:limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return shown({"object": "list", "data": page, "has_more": len(items) > limit} | ends)


def shown(body: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
